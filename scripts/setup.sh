# Sourced by scripts/test and scripts/demo: Debian packages, the virtual environment, the C extension.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
DEMO_PACKAGES=(gcc pkg-config python3-dev python3-venv libxxhash-dev libnghttp2-dev libssl-dev libzstd-dev)
TEST_PACKAGES=("${DEMO_PACKAGES[@]}" iproute2 qemu-system-x86 tmux chromium chromium-driver)
SANITIZE_PACKAGES=(clang libclang-rt-dev)
PYTHON_PROBE='
import ensurepip, os, sys, sysconfig, venv
ok = sys.version_info >= (3, 11) and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
sys.exit(0 if ok else 1)'

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

# retry TIMES COMMAND...: package mirrors drop connections now and then.
retry() {
    local times=$1 attempt
    shift
    for ((attempt = 1; attempt <= times; attempt++)); do
        "$@" && return 0
        say "attempt $attempt of $times failed: $1"
        sleep $((attempt * 2))
    done
    return 1
}

# install_packages PACKAGE...: installs what is missing; does nothing where there is no dpkg.
install_packages() {
    local package missing=()
    if ! command -v dpkg-query >/dev/null; then
        say "this is not Debian; it needs the equivalents of: $*"
        return 0
    fi
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    [ "$(id -u)" -eq 0 ] || fail "missing Debian packages; as root: apt-get install ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    retry 3 apt-get -qq update >&2 || say "apt-get update failed; trying with the lists that are here"
    DEBIAN_FRONTEND=noninteractive retry 3 apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 \
        install "${missing[@]}" >&2 || fail "apt-get could not install ${missing[*]}"
}

# Prints a python3 of at least 3.11 with venv and headers.
choose_python() {
    local candidate
    for candidate in "$(command -v python3)" /usr/bin/python3; do
        if [ -n "$candidate" ] && "$candidate" -c "$PYTHON_PROBE" 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

hash_of() { cat -- "$@" | sha256sum | cut -d' ' -f1; }

# Whether the stamp named $1 holds $2.
stamped() { [ "$(cat "$VENV/$1.stamp" 2>/dev/null)" = "$2" ]; }

stamp() { printf '%s\n' "$2" >"$VENV/$1.stamp"; }

create_venv() {
    local python
    "$VENV/bin/python" -c "$PYTHON_PROBE" 2>/dev/null && return 0
    python=$(choose_python) || fail "no python3 of at least 3.11 with venv and Python.h"
    say "creating .venv with $("$python" --version)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV" || fail "python -m venv failed"
}

# install_requirements runtime|dev. What dev installs includes runtime.
install_requirements() {
    local which=$1 wanted
    wanted=$(hash_of "$ROOT/requirements/runtime.txt" "$ROOT/requirements/dev.txt")
    stamped dev "$wanted" || stamped "$which" "$wanted" && return 0
    say "installing requirements/$which.txt"
    retry 3 "$VENV/bin/python" -m pip install -qq --disable-pip-version-check \
        -r "$ROOT/requirements/$which.txt" >&2 || fail "pip could not install requirements/$which.txt"
    stamp "$which" "$wanted"
}

# Builds the C extension in place and installs the command, if anything they are made of has changed.
build_extension() {
    local inputs wanted built
    mapfile -t inputs < <(find "$ROOT"/migrate/native{,/preload} -maxdepth 1 \( -name '*.[ch]' -o -name build.py \) \
        ! -name _native.c | LC_ALL=C sort)
    wanted=$(printf '%s\n' "${inputs[@]#"$ROOT"}" | cat - "$ROOT/pyproject.toml" "$ROOT/setup.py" "${inputs[@]}" |
        sha256sum | cut -d' ' -f1)
    built=$(compgen -G "$ROOT/migrate/native/_native*.so" || true)
    [ -n "$built" ] && stamped build "$wanted" && return 0
    say "building the C extension"
    # setuptools goes by time stamps, which a checkout does not keep in order.
    rm -rf "$ROOT"/build/{lib,temp,bdist}.* "$ROOT"/migrate/native/_native*.so "$ROOT"/migrate/native/_native.c
    retry 2 "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps \
        -e "$ROOT" >&2 || fail "the C extension did not build"
    stamp build "$wanted"
}

# Builds the Linux guest for QEMU in build/linux-guest, once; 77 if that, or running it, is not possible here.
prepare_linux_guest() {
    command -v qemu-system-x86_64 >/dev/null || return 77
    local status=0
    "$ROOT/scripts/build_linux_guest" || status=$?
    # 77: not possible here, and it has said why.
    [ $status -eq 0 ] || [ $status -eq 77 ] || fail "the Linux guest did not build"
    return $status
}

# prepare runtime|dev PACKAGE...: everything, once; the second run only compares hashes.
prepare() {
    local which=$1
    shift
    install_packages "$@"
    # Two runs in one tree take turns here.
    exec 9<"$ROOT"
    flock 9
    create_venv
    install_requirements "$which"
    build_extension
    exec 9<&-
}

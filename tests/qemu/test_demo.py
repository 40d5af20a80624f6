"""`migrate demo --kind qemu`."""

import pytest

from tests.harness import cli

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(150)]


def test_demo_moves_linux_and_has_it_check_itself(linux_image):
    env = {"MIGRATE_LINUX_GUEST": str(linux_image.kernel.parent)}
    result = cli.run("demo", "--kind", "qemu", "--verify", "--json", env=env)

    assert result.exit_code == 0, result.stderr
    report = cli.json_of(result)
    assert (report["guest_kind"], report["state"], report["guest_errors"]) == ("qemu", "completed", 0)
    assert report["verified_pages"] == report["pages"]["total"] == 256 << 20 >> 12

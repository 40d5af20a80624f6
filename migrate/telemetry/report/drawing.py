"""SVG, with little: elements, scales with honest ticks, and images made of numbers. Knows nothing of migrations."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

CHARACTER_PX = 7.2
"""How wide a letter of a chart is, at most, on the average."""


class Drawing:
    """One SVG, whose text and attributes are escaped.

    Args:
        width: In pixels, at which it is shown unless there is less room.
        height: The same.
        label: What it shows, for those who do not see it.
    """

    def __init__(self, width: int, height: int, label: str) -> None:
        self.width, self.height = width, height
        self._parts: list[Markup] = []
        self._label = label

    def add(self, tag: str, words: str = "", *, hint: str = "", **attributes: str | float) -> None:
        """Add an element, with text in it, or with a hint for those who point at it."""
        written = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"' for name, value in attributes.items()
        )
        inner = f"<title>{escape(hint)}</title>" if hint else escape(words)
        self._parts.append(Markup(f"<{tag}{written}>{inner}</{tag}>" if inner else f"<{tag}{written}/>"))  # noqa: S704 - escaped above

    def box(self, x: float, y: float, width: float, height: float, class_: str, **attributes: str) -> None:
        """Draw a rectangle."""
        self.add("rect", x=x, y=y, width=width, height=height, class_=class_, **attributes)

    def text(self, words: str, x: float, y: float, class_: str = "", anchor: str = "start") -> None:
        """Write words at a place."""
        self.add("text", words, x=x, y=y, class_=class_ or "tick", text_anchor=anchor)

    def mask(self, name: str, shares: np.ndarray) -> None:
        """Define a mask from rows of numbers, 0 hides and 1 shows, for whatever rectangle is given it."""
        self._parts.append(
            Markup(
                '<mask id="{}" maskContentUnits="objectBoundingBox"><image width="1" height="1" '
                'preserveAspectRatio="none" href="data:image/png;base64,{}"/></mask>'
            ).format(name, png_of(shares))
        )

    def markup(self) -> Markup:
        """The whole element."""
        head = Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" '
            'role="img" aria-label="{2}">'
        ).format(self.width, self.height, self._label)
        return head + Markup("").join(self._parts) + Markup("</svg>")


@dataclass(frozen=True, slots=True)
class Scale:
    """From numbers to pixels.

    Attributes:
        low, high: The numbers at both ends; what is beyond them is drawn at the end.
        from_px, to_px: Where these are.
        is_log: Equal ratios are equal distances.
    """

    low: float
    high: float
    from_px: float
    to_px: float
    is_log: bool = False

    def px(self, value: float) -> float:
        """Where a number is."""
        return float(self.all_px(np.array([value]))[0])

    def all_px(self, values: np.ndarray) -> np.ndarray:
        """Where numbers are."""
        low, high = self.low, self.high
        clipped = np.clip(values, low, high).astype(np.float64)
        if self.is_log:
            clipped, low, high = np.log10(clipped), math.log10(low), math.log10(high)
        share = (clipped - low) / (high - low) if high > low else np.zeros(len(clipped))
        return np.asarray(self.from_px + share * (self.to_px - self.from_px))


def linear_ticks(low: float, high: float, count: int = 5, base: int = 10) -> list[float]:
    """About so many round numbers between two; for base 2, multiples of a power of two."""
    span = high - low
    if span <= 0:
        return [low]
    if base == 2:  # noqa: PLR2004
        step = 2.0 ** math.ceil(math.log2(span / count))
    else:
        power = 10.0 ** math.floor(math.log10(span / count))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * count >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_range(low: float, high: float) -> tuple[float, float]:
    """One, two or five times powers of ten around two positive numbers."""
    return _round_log(low, is_up=False), _round_log(high, is_up=True)


def log_ticks(low: float, high: float) -> list[tuple[float, bool]]:
    """Every multiple of a power of ten in a range, and whether there is room to name it."""
    decades = math.log10(high / low)
    named = {1} if decades > 4 else {1, 2, 5} if decades < 2.5 else {1, 3}  # noqa: PLR2004
    ticks = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for factor in range(1, 10):
            value = factor * 10.0**power
            if low * 0.999 <= value <= high * 1.001:
                ticks.append((value, factor in named))
    return ticks


def steps_path(xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> str:
    """A path that goes across at each height, then up or down to the next."""
    commands, last = [f"M{_plain(xs[0])} {_plain(ys[0])}"], (_plain(xs[0]), _plain(ys[0]))
    for x, y in zip(xs[1:], ys[1:], strict=True):
        at = (_plain(x), _plain(y))
        if at[0] != last[0]:
            commands.append(f"H{at[0]}")
        if at[1] != last[1]:
            commands.append(f"V{at[1]}")
        last = at
    return "".join(commands)


def png_of(shares: np.ndarray) -> str:
    """A grey image of rows of numbers, the first row below, as base64."""
    grey = np.rint(np.clip(shares[::-1], 0, 1) * 255).astype(np.uint8)
    height, width = grey.shape
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    image = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return base64.b64encode(image).decode()


def _round_log(value: float, *, is_up: bool) -> float:
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    factors = (1, 2, 5, 10)
    if is_up:
        return min(factor for factor in factors if factor * power >= value * 0.999) * power
    return max(factor for factor in factors if factor * power <= value * 1.001) * power


def _plain(value: str | float) -> str:
    """A number as short as a tenth of a pixel allows."""
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")

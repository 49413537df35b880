"""The letters of pictures: fonts that have them, their widths, and where lines break."""

from __future__ import annotations

import importlib
import re
import unicodedata
from types import ModuleType
from typing import Any

from transformers.utils import logging

from .reports import import_optional, visible_text

logger = logging.get_logger(__name__)

FONT_SIZE = 9.0  # points
_USUAL_DPI = (72, 100, 150, 200)
_MISSING = "\N{WHITE SQUARE}"
# matplotlib's own font, which comes first, has no Chinese, Japanese or Korean.
_MORE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK TC", "Noto Sans CJK KR", "Noto Sans CJK HK"),
    *("Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Apple SD Gothic Neo", "Heiti TC", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "MS Gothic", "Malgun Gothic", "SimHei", "Noto Sans", "Noto Emoji"),
)
_NO_FONT = (
    f"No installed font has some of the characters in these steps; each is drawn as {_MISSING}. For Chinese, Japanese "
    "and Korean install Noto Sans CJK or WenQuanYi Zen Hei, then delete the folder matplotlib.get_cachedir(), where "
    "matplotlib keeps its list of fonts."
)
# Where a line may end: after space, and on both sides of a Chinese, Japanese or Korean character, but not before
# closing punctuation.
_UNITS = re.compile(r"\s+|[^\s\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]+|.[、。，．：；！？）」』】〕》]*")


class Letters:
    """Measures and breaks text in the fonts that draw it: matplotlib's own, then others that the text needs."""

    def __init__(self) -> None:
        self._manager = import_matplotlib("font_manager")
        self._hinting = import_matplotlib("backends.backend_agg").get_hinting_flag()
        settings = importlib.import_module("matplotlib").rcParams
        # Before its release 3.11 matplotlib hints letters that it has stretched by this factor.
        self._stretch = settings["text.hinting_factor"] or 1
        self._families = list(settings["font.family"])
        self._fonts = [self._font(name) for name in self._families]
        installed = set(self._manager.fontManager.get_font_names())
        self._further = [name for name in _MORE_FONTS if name in installed]
        self._widths: dict[str, float | None] = {}

    def style(self) -> dict[str, Any]:
        """What text is drawn with once it is wrapped: LaTeX is not interpreted, which fails where it is broken."""
        return {"family": list(self._families), "size": FONT_SIZE, "parse_math": False, "usetex": False}

    def wrap(self, text: str, width: float, max_lines: int) -> list[str]:
        """Break text into at most so many lines of this width in inches; an ellipsis ends what is left out."""
        room = 72.0 * width
        lines, used = [""], 0.0
        for unit in _UNITS.findall(self._drawable(text)):
            size = self._measure(unit)
            pieces = [unit] if size <= room else list(unit)
            for piece in pieces:
                size = self._measure(piece)
                if used + size > room:
                    lines.append("")
                    used = 0.0
                if used or not piece.isspace():
                    lines[-1] += piece
                    used += size
            if len(lines) > max_lines:
                return [line.rstrip() for line in lines[: max_lines - 1]] + [self._cut(lines[max_lines - 1], room)]
        return [line.rstrip() for line in lines if line.strip()] or [""]

    def _cut(self, line: str, room: float) -> str:
        while line and self._measure(line + "…") > room:
            line = line[:-1]
        return line.rstrip() + "…"

    def _measure(self, text: str) -> float:
        """The width in points, without kerning."""
        return sum(self._width(character) or 0.0 for character in text)

    def _width(self, character: str) -> float | None:
        """A character's width in points, None where no font has it."""
        if character not in self._widths:
            font = self._font_with(ord(character))
            self._widths[character] = None if font is None else self._advance(font, character)
        return self._widths[character]

    def _advance(self, font: Any, character: str) -> float:
        """Advances are rounded to pixels, so text is wider at some resolutions; the widest of the usual ones counts."""
        widths = []
        for dpi in _USUAL_DPI:
            # Fonts are shared with the renderer, which sets the size that it needs before it draws.
            font.set_size(FONT_SIZE, dpi)
            advance = font.load_char(ord(character), flags=self._hinting).horiAdvance / 64 / self._stretch
            widths.append(advance * 72 / dpi)
        return max(widths)

    def _font_with(self, code: int) -> Any:
        """The first font that has a character, None where none has; a further font is taken when it is needed."""
        for font in self._fonts:
            if font.get_char_index(code):
                return font
        for name in self._further:
            font = self._font(name)
            if font.get_char_index(code):
                self._families.append(name)
                self._fonts.append(font)
                return font
        return None

    def _font(self, name: str) -> Any:
        return self._manager.get_font(self._manager.findfont(self._manager.FontProperties(family=[name])))

    def _drawable(self, text: str) -> str:
        """The text on one line, with a square for each character that no font has, which is said once."""
        one_line = " ".join(visible_text(text).split())
        shown = []
        for character in one_line:
            if self._width(character) is not None:
                shown.append(character)
            elif unicodedata.category(character) not in ("Cf", "Mn"):
                shown.append(_MISSING)
                logger.warning_once(_NO_FONT)
        return "".join(shown)


def import_matplotlib(module: str) -> ModuleType:
    return import_optional(f"matplotlib.{module}", "a picture", "matplotlib")

"""Icons with names: about 16,000 pairs of an image and a sentence that come with `qtawesome`.

The package (MIT; its fonts are OFL, Apache, MIT or CC-BY) holds icon fonts whose glyphs have names
made of words, such as "arrow left bold circle outline". Its files are read without importing it,
which would need Qt. Left out are fonts of brands, older versions of a font, glyphs that show
nothing, and logos of companies and products, which are known by their names.

Icons of one concept differ in style only ("bell", "bell-outline"), some fonts have glyphs of the
same shape under two names, and some names occur in several fonts. So a split keeps all icons
together that share a concept or a bitmap, and in retrieval pairs that share a name or a bitmap
count as each other's.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .text_corpus import split_of

__all__ = [
    "COLOURS",
    "STYLE_WORDS",
    "Icon",
    "icon_fingerprint",
    "load_icons",
    "render_icon",
    "split_icons",
]

Split = Literal["train", "val", "test"]

# fmt: off
STYLE_WORDS = frozenset((
    "alt", "bold", "duotone", "fill", "filled", "light", "line", "outline", "regular", "sharp",
    "solid", "thin", "variant",
))
# fmt: on
# An icon in plain ink has a caption without a colour.
_INK = (31, 41, 51)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (232, 119, 34),
    "yellow": (226, 178, 3),
    "green": (46, 139, 61),
    "blue": (37, 99, 198),
    "purple": (126, 63, 178),
    "pink": (224, 92, 160),
    "brown": (121, 78, 45),
}

# What the names of the font files end in.
_VERSION = re.compile(r"(-webfont)?-[\d.]+$")
_SKIPPED_FONTS = ("brands", "fontawesome5", "materialdesignicons5")
# Companies and products in the names of icons that have other words too.
_COMPANIES = re.compile(
    r"\b("
    r"adobe|alipay|amazon|android|atlassian|aws|azure|bilibili|bitbucket|centos|"
    r"chromecast|cisco|codepen|debian|discord|disqus|docker|douban|dribbble|dropbox|"
    r"evernote|facebook|fedora|figma|firefox|flutter|freebsd|gatsby|github|gitlab|google|"
    r"hulu|instagram|invision|kakao|linkedin|linux|mastercard|mastodon|messenger|"
    r"microsoft|netease|netflix|nintendo|npmjs|patreon|paypal|pinterest|pixelfed|"
    r"playstation|qq|raspberry|reactjs|reddit|redhat|remixicon|safari|skype|slack|"
    r"snapchat|sony|soundcloud|spotify|stackshare|taobao|telegram|tiktok|trello|tumblr|"
    r"twitch|twitter|ubuntu|unsplash|vimeo|visa|vuejs|wechat|weibo|whatsapp|wordpress|"
    r"xbox|xing|youtube|zcool|zhihu"
    r")\b"
)
# Pixels at which bitmaps are compared.
_COMPARED_SIZE = 32
# Share of an image's side that the longer side of an icon takes.
_EXTENT = 0.8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Icon:
    """A named glyph of a font.

    Attributes:
        name: Font and name in it, such as "phosphor/bell-bold"; no two icons share it.
        caption: The words of the name, "bell bold".
        concept: The caption without words of style and numbers at its end, "bell".
        font: File of the font.
        character: The glyph's character in it.
        image_id: Number that icons with the same bitmap share.
    """

    name: str
    caption: str
    concept: str
    font: str
    character: str
    image_id: int


@functools.lru_cache(maxsize=2)
def load_icons(*, with_logos: bool = False) -> tuple[Icon, ...]:
    """Finds the icons, in a fixed order.

    Args:
        with_logos: Whether to keep logos of companies and products.

    Returns:
        The icons.

    Raises:
        RuntimeError: The package `qtawesome` is not installed.
    """
    folder = _font_folder()
    brands = _brand_names(folder)
    icons: list[Icon] = []
    image_ids: dict[tuple[tuple[int, int], bytes], int] = {}
    for path in sorted(folder.glob("*charmap*.json")):
        if any(skipped in path.name for skipped in _SKIPPED_FONTS):
            continue
        font = folder / path.name.replace("-charmap", "").replace(".json", ".ttf")
        for key, code in json.loads(path.read_text()).items():
            caption = _words(key)
            concept = _concept(caption)
            if not with_logos and _is_logo(caption, concept, brands):
                continue
            character = chr(int(code, 16))
            mask = _glyph(str(font), _COMPARED_SIZE, character)
            if mask is None:
                continue
            image_id = image_ids.setdefault((mask.size, mask.tobytes()), len(image_ids))
            icons.append(
                Icon(
                    name=f"{_VERSION.sub('', font.stem)}/{key}",
                    caption=caption,
                    concept=concept,
                    font=str(font),
                    character=character,
                    image_id=image_id,
                )
            )
    return tuple(icons)


def split_icons(
    icons: Sequence[Icon], *, val_fraction: float = 0.05, test_fraction: float = 0.1
) -> dict[Split, list[Icon]]:
    """Splits icons so that no concept and no bitmap is in two parts, by a hash of the concept.

    Args:
        icons: The icons.
        val_fraction: Share of the concepts held out for validation.
        test_fraction: Share held out for the test.

    Returns:
        The icons of each part, in their order.
    """
    parents: dict[str, str] = {}

    def root(concept: str) -> str:
        while (parent := parents.setdefault(concept, concept)) != concept:
            concept = parent
        return concept

    concepts: dict[int, str] = {}
    for icon in icons:
        # The first in the alphabet stands for all that are joined.
        first, last = sorted(
            map(root, (concepts.setdefault(icon.image_id, icon.concept), icon.concept))
        )
        parents[last] = first
    splits: dict[Split, list[Icon]] = {"train": [], "val": [], "test": []}
    for icon in icons:
        key = root(icon.concept)
        splits[split_of(key, val_fraction=val_fraction, test_fraction=test_fraction)].append(icon)
    return splits


def render_icon(
    icon: Icon, size: int, *, generator: np.random.Generator | None = None
) -> tuple[Image.Image, str]:
    """Draws an icon, on white.

    Args:
        icon: The icon.
        size: Pixels of a side.
        generator: Draws size and place and, half the time, one of `COLOURS`, whose name then comes
            first in the caption; None draws it large, in the middle and in dark ink.

    Returns:
        The image, RGB, and its caption.
    """
    colour, extent, shift = "", _EXTENT, (0.0, 0.0)
    if generator is not None:
        if generator.random() < 0.5:
            colour = str(generator.choice(list(COLOURS)))
        extent *= generator.uniform(0.7, 1.1)
        # As far as there is room.
        low, high = -(1 - extent) / 2, (1 - extent) / 2
        shift = (generator.uniform(low, high), generator.uniform(low, high))
    mask = _fitted_glyph(icon, max(1, round(extent * size)))
    left, top = (
        round((size - length) / 2 + part * size)
        for length, part in zip(mask.size, shift, strict=True)
    )
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).bitmap((left, top), mask, fill=COLOURS.get(colour, _INK))
    return image, f"{colour} {icon.caption}".lstrip()


def icon_fingerprint(splits: dict[Split, list[Icon]]) -> str:
    """Returns a short hash of which icons are in which part and which look the same."""
    content = [
        (split, [(icon.name, icon.character, icon.image_id) for icon in icons])
        for split, icons in splits.items()
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _font_folder() -> Path:
    # Importing it would need Qt.
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "icons are those of the package qtawesome, which is not installed. Run: "
            "pip install qtawesome==1.4.2 (the extra `image-text` has it)."
        )
    return Path(spec.submodule_search_locations[0]) / "fonts"


def _words(name: str) -> str:
    return " ".join(re.split("[-_]+", name))


def _concept(caption: str) -> str:
    words = caption.split()
    while len(words) > 1 and (words[-1] in STYLE_WORDS or words[-1].isdigit()):
        words.pop()
    return " ".join(words)


def _brand_names(folder: Path) -> set[str]:
    """Returns the names in Font Awesome's fonts of brands, without spaces."""
    paths = folder.glob("*brands*.json")
    return {_joined(_words(key)) for path in paths for key in json.loads(path.read_text())}


def _joined(words: str) -> str:
    # Fonts write "stack overflow" and "stackoverflow".
    return words.replace(" ", "")


def _is_logo(caption: str, concept: str, brands: set[str]) -> bool:
    words = caption.split()
    return (
        _joined(concept) in brands
        or "logo" in words
        # As "apple safari" and "language python"; an apple to eat is "food apple".
        or (words[0] in ("apple", "language") and len(words) > 1)
        or _COMPANIES.search(caption) is not None
    )


def _fitted_glyph(icon: Icon, extent: int) -> Image.Image:
    """Draws a glyph whose longer side has about so many pixels."""
    font_size = max(1, int(extent / _relative_extent(icon.font, icon.character)))
    mask = _glyph(icon.font, font_size, icon.character)
    # A hairline may vanish where it is very small.
    return Image.new("L", (extent, extent)) if mask is None else mask


@functools.cache
def _relative_extent(font: str, character: str) -> float:
    """Returns the longer side of a glyph in units of the font's size."""
    mask = _glyph(font, _COMPARED_SIZE, character)
    assert mask is not None
    return max(mask.size) / _COMPARED_SIZE


def _glyph(font: str, font_size: int, character: str) -> Image.Image | None:
    """Returns how much ink each pixel of a glyph has, or None if it shows nothing."""
    font_object = _font(font, font_size)
    left, top, right, bottom = font_object.getbbox(character)
    image = Image.new("L", (int(right - left) or 1, int(bottom - top) or 1))
    ImageDraw.Draw(image).text((-left, -top), character, font=font_object, fill=255)
    box = image.getbbox()
    return None if box is None else image.crop(box)


@functools.lru_cache(maxsize=256)
def _font(path: str, font_size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, font_size)

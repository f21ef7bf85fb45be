"""The embedded image data set: letters of five scripts, rendered from the DejaVu fonts that matplotlib ships."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_modules.class_images import ClassImages
from data_modules.pictures import PictureTasks
from data_modules.reading.cache import Sample
from data_modules.reading.pictures import InkReader
from dmaml_pl.data import Split
from dmaml_pl.tasks import derive_seed

# The letters, upper and lower case, that all twelve faces have, without those made of a letter and an accent. Letters
# that look alike are in here once, over all the splits: taken in the order test, val, train, a letter is left out where
# in any face its picture, blurred a little (Gaussian, 1.5 pixels), correlates by more than 0.97 with that of a letter
# already taken. So Latin A yields to Greek Alpha, and Latin S to the Armenian letter that looks like it.
LETTERS: dict[Split, str] = {
    "train": (
        # Latin, 133
        "CGQRVWaefkryÆÐØßðđŁŊŒœŧƀƁƂƄƇƊƋƎƏƑƓƔƜƝƢƣƤƦƧƪƫƮƶƷƸƺƼƾƿǶȜȡȤȴȵȸȺȻȾȿɀɁɄɕɗɘɚɜɝɠɢɥɧɨɪɬɮɲɷɸɹɻɽɾɿʁʂʆʇʊʋ"  # noqa: RUF001 - letters are the data here
        "ʌʍʎʐʑʓʕʖʛʝʞʡʣʤʦʧʨʩʪʫʬʭᴉᴖᴗᴝᴞᴟⱤⱮⱵⱹꜦꞋꞌꞍꞐꞑꞪ"
        # Cyrillic, 31
        "ДЖЛЦЩЪЫЮЯлЂЉЊЋђєћџѢѣҐғҖҘҚҤҲҺӄӋӶ"
    ),
    "val": (
        # Greek, 46
        "ΑΒΓΔΕΖΗΚΜΝΞΣΤΥΧΨΩαβδεζλμνξςστωϗϘϚϜϝϞϟϠϡϷϺϻϼϽϾϿ"
    ),
    "test": (
        # Armenian, 60
        "ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՃՄՅՆՇՈՉՊՋՎՏՐՒՓՔՕՖաբդըթիլխծկհձճմյնշչպջռսվցփֆ"
        # Georgian, 28
        "აგდეზთკლმნოჟრსფქღყცჭჯჰჲჳჴჵჶჹ"
    ),
}
FACES = [
    f"DejaVu{family}.ttf"
    for family in (
        *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique"),
        *("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
        *("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic"),
    )
]
SAMPLES = 24  # two a face
SIZE = 28
FINE = 3  # drawn this many times larger, and then averaged down
LETTER = 20  # longest side of an unchanged letter, in pixels
# Largest change of a sample: turn (radians), slant (tangent), scale (natural logarithm), shift in x and in y (pixels).
CHANGES = (math.radians(12), 0.15, 0.12, 2.0, 2.0)


class Glyphs(PictureTasks):
    """Letters as 28x28 images, for a first training that needs no download: one class a letter, 24 samples a class.

    Meta-training has 164 letters of the Latin and Cyrillic scripts, validation 46 of the Greek, and meta-testing 88 of
    the Armenian and Georgian, so that it asks for scripts never seen; no two classes of them all look alike. A class is
    drawn twice in each of twelve type faces, and every sample turned, slanted, scaled and shifted a little. The drawing
    takes a second or two, and is done once.

    Args:
        meta_batch: T, tasks in the meta-batch of one worker.
        settings: those of `PictureTasks`; at most 24 shots and queries together.

    Examples:
        >>> data = Glyphs(ways=5, shots=1, meta_batch=4)
        >>> data.ways, data.shots
        (5, 1)
    """

    reader = InkReader(SIZE)

    def __init__(self, *, meta_batch: int = 16, **settings: Any) -> None:
        super().__init__(meta_batch=meta_batch, **settings)

    def load_parts(self) -> dict[str, ClassImages]:
        """The letters of each split, rendered unless they are in the cache."""
        settings = (LETTERS, FACES, SAMPLES, SIZE, FINE, LETTER, CHANGES, metadata.version("matplotlib"))
        return self.cached("glyphs", _render_all, identity=repr(settings), what="letters")

    def load_splits(self) -> dict[Split, Tensor]:
        """The images of each split, uint8 (classes, 24, 1, 28, 28), 255 where there is ink."""
        parts = self.load_parts()
        return {split: parts[split].stacked() for split in LETTERS}


def load_fonts() -> list[ImageFont.FreeTypeFont]:
    """The twelve faces, large enough to be drawn finely."""
    import matplotlib as mpl  # noqa: PLC0415 - for its fonts alone

    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    basic = ImageFont.Layout.BASIC  # the other layout is not in every build of Pillow
    return [ImageFont.truetype(folder / face, SIZE * FINE, layout_engine=basic) for face in FACES]


def render(letter: str, font: ImageFont.FreeTypeFont, change: tuple[float, ...] = (0.0,) * 5) -> np.ndarray:
    """One letter, uint8 (28, 28): white on black, scaled to fit, centred, then changed.

    Args:
        letter: the character.
        font: the face to draw it in.
        change: how far to turn, slant, scale and shift it, as in `CHANGES`.
    """
    turn, slant, scale, *shift = change
    left, top, right, bottom = font.getbbox(letter)
    width, height = int(right - left), int(bottom - top)
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).text((-left, -top), letter, font=font, fill=255)

    # From the letter (coordinates from its centre) to the finely drawn picture.
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, -slant], [0.0, 1.0]])
    matrix *= math.exp(scale) * LETTER * FINE / max(width, height)
    # Half the size of the changed letter; it must stay inside the picture, a pixel from the border.
    half = np.abs(matrix) @ np.array([width, height]) / 2
    most = (SIZE / 2 - 1) * FINE
    shrink = min(1.0, most / half.max())
    offset = np.clip(np.array(shift) * FINE, -(most - half * shrink), most - half * shrink)

    inverse = np.linalg.inv(matrix * shrink)  # Pillow asks where each pixel comes from
    origin = np.array([width, height]) / 2 - inverse @ (offset + SIZE * FINE / 2)
    data = (*inverse[0], origin[0], *inverse[1], origin[1])
    fine = (SIZE * FINE, SIZE * FINE)
    changed = drawn.transform(fine, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return np.asarray(changed.resize((SIZE, SIZE), Image.Resampling.BOX))


def _render_all() -> Iterator[Sample]:
    fonts = load_fonts()
    for split, letters in LETTERS.items():
        for letter in letters:
            for image in _samples(fonts, letter):
                yield split, letter, image[None]


def _samples(fonts: list[ImageFont.FreeTypeFont], letter: str) -> list[np.ndarray]:
    """All 24 samples of one class, uint8 (28, 28); they do not depend on the other classes."""
    generator = torch.Generator().manual_seed(derive_seed("glyphs", letter))
    changes = (2 * torch.rand(SAMPLES, 5, generator=generator) - 1) * torch.tensor(CHANGES)
    faces = [fonts[number % len(fonts)] for number in range(SAMPLES)]
    return [render(letter, face, tuple(change)) for face, change in zip(faces, changes.tolist(), strict=True)]

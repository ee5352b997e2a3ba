"""A contact sheet: a row a query, its neighbours beside it, nearest first, each with its cosine and key."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from prelude.data.decode import BadImage
from prelude.data.errors import UserError
from prelude.data.shards import ShardIndex
from prelude.evaluators.embedding.neighbours import Found, Query, read_file
from prelude.evaluators.embedding.reading import Embedded
from prelude.evaluators.embedding.samples import pixels_of
from prelude.pretrain.images import shown

TILE, GAP, LINE = 112, 8, 14  # pixels
PAPER, INK, FAINT, EDGE = (255, 255, 255), (24, 24, 24), (110, 110, 110), (200, 200, 200)
MOST_ROWS = 200


def contact_sheet(embedded: Embedded, index: ShardIndex, found: Sequence[Found]) -> bytes:
    """A PNG. Raises UserError for more queries than a sheet has room for."""
    if len(found) > MOST_ROWS:
        raise UserError(f"A sheet has room for {MOST_ROWS} images and their neighbours, not {len(found)}; name fewer.")
    data = embedded.about["data"]
    channels, colours = data["channels"], tuple(data.get("shown_channels", ()))
    columns = 1 + max(len(one.rows) for one in found)
    wide, high = TILE + GAP, TILE + 2 * LINE + GAP
    page = Image.new("RGB", (columns * wide + 3 * GAP, len(found) * high + GAP), PAPER)
    for line, one in enumerate(found):
        top = GAP + line * high
        query = _coloured(_of_query(embedded, index, one.query), colours)
        _show(page, (GAP, top), query, ("query", _name(embedded, one.query)))
        for place, (row, cosine) in enumerate(zip(one.rows, one.cosines, strict=True), start=1):
            (pixels,) = pixels_of(index, [int(embedded.sample_ids[row])], channels)
            words = [f"{cosine:.4f}", embedded.keys[row]]
            if embedded.labels is not None and embedded.labels[row] >= 0:
                words[0] += f"  label {embedded.labels[row]}"
            _show(page, (3 * GAP + place * wide, top), _coloured(pixels, colours), words)
    draw = ImageDraw.Draw(page)
    draw.line([(wide + 2 * GAP, GAP), (wide + 2 * GAP, page.height - GAP)], EDGE)
    content = io.BytesIO()
    page.save(content, "PNG", optimize=True)
    return content.getvalue()


def _of_query(embedded: Embedded, index: ShardIndex, query: Query) -> np.ndarray | str:
    if query.row is not None:
        return next(pixels_of(index, [int(embedded.sample_ids[query.row])], embedded.about["data"]["channels"]))
    try:
        return read_file(embedded, query.path)
    except (OSError, BadImage) as error:
        return str(error)


def _name(embedded: Embedded, query: Query) -> str:
    return query.name if query.row is None else embedded.keys[query.row]


def _show(page: Image.Image, corner: tuple[int, int], image: Image.Image | str, words: Sequence[str]) -> None:
    """image: shown whole, a small one unsmoothed; or why there is none."""
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    left, top = corner
    if isinstance(image, str):
        draw.rectangle([left, top, left + TILE - 1, top + TILE - 1], outline=EDGE)
        draw.text((left + 4, top + 4), _fitting(image, font), FAINT, font)
    else:
        scale = TILE / max(image.size)
        smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        image = image.resize([max(round(side * scale), 1) for side in image.size], smooth)
        page.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
    for line, (text, ink) in enumerate(zip(words, (INK, FAINT), strict=True)):
        draw.text((left, top + TILE + 1 + line * LINE), _fitting(text, font), ink, font)


def _coloured(pixels: np.ndarray | str, colours: tuple[int, ...]) -> Image.Image | str:
    """pixels: (H, W, C) on the scale of 8 bits, or why there are none. colours: see `ViewPlan.shown`."""
    if isinstance(pixels, str):
        return pixels
    (image,) = shown(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None], colours)
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _fitting(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The end of a name says more than its beginning."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    short = text
    while font.getlength(short) > TILE and len(text) > 1:
        text = text[1:]
        short = f"…{text}"
    return short

"""The page that shows a comparison, as one file."""

from html import escape

from evaluators.comparison import Comparison
from evaluators.comparison_table import markdown


def page(comparison: Comparison) -> str:
    title = escape(comparison.title)
    body = f"<h1>{title}</h1><pre>{escape(markdown(comparison))}</pre>"
    return f"<!doctype html><html><head><meta charset=utf-8><title>{title}</title></head><body>{body}</body></html>\n"

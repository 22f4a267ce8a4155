"""A gallery: the images on which the rows of a board differ most, with what each row detects on them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Panel(BaseModel):
    """One picture.

    `name`: what it shows, such as "ground truth" or a row. `alt`: its content in words. `mime`: its format.
    """

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    name: str
    alt: str
    image: bytes
    mime: str


class Item(BaseModel):
    """One image of the data: `title` names it, `alt` says how the rows differ on it, `panels` lie side by side."""

    model_config = ConfigDict(frozen=True)

    title: str
    alt: str
    panels: tuple[Panel, ...]


class Gallery(BaseModel):
    """The images on which the rows differ most. `note`: how they were chosen, and what is missing, in sentences."""

    model_config = ConfigDict(frozen=True)

    items: tuple[Item, ...] = ()
    note: str = ""

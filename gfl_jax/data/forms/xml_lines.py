"""XML with line numbers, from files of strangers."""

import xml.etree.ElementTree as ET
from pathlib import Path
from xml.parsers import expat

LINE = "#line"
"""Attribute of each element: the line that it begins in. XML cannot have one of this name."""


def read_xml(file: Path) -> ET.Element:
    """The root of an XML file.

    Entities cannot be declared: a few lines of them can stand for gigabytes of text.

    Raises:
        ValueError: it is not well-formed, or declares a document type.
        OSError: it cannot be read.
    """
    parser, builder = expat.ParserCreate(), ET.TreeBuilder()

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, attributes | {LINE: str(parser.CurrentLineNumber)})

    def refuse(*_: object) -> None:
        raise ValueError(
            f"line {parser.CurrentLineNumber}: a document type (<!DOCTYPE>), which annotations do "
            "not need and which can do harm: delete it"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    data = file.read_bytes()
    try:
        parser.Parse(data.lstrip() if data[:1].isspace() else data, True)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise ValueError(f"line {error.lineno}: not well-formed XML ({reason})") from error
    except LookupError as error:
        raise ValueError(f"an encoding that is not known ({error}): save it as UTF-8") from error
    return builder.close()


def line_of(element: ET.Element) -> str:
    """'line 3'."""
    return f"line {element.get(LINE)}"


def number(element: ET.Element | None, name: str) -> float:
    """A number that an element holds as an attribute, or else in a child of this name.

    Raises:
        ValueError: there is none; the message names it.
    """
    text = None if element is None else element.get(name, element.findtext(name))
    try:
        return float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        said = "is missing" if text is None else f"is {text.strip()!r}"
        raise ValueError(f"{name} {said}: it must be a number") from None

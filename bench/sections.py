"""Parts of documents that benchmarks write: between `<!-- name -->` and `<!-- end of name -->`."""

import pathlib


def put_sections(document: pathlib.Path, sections: dict[str, list[str]]) -> None:
    """The lines of every section in the place of those before. ValueError where the document has no such section."""
    text = document.read_text()
    for name, lines in sections.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{document} has no section {name}, or several")
        before, rest = text.split(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    document.write_text(text)

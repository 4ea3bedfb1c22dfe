"""Lets pages link to the sources of the examples, which lie beside the folder of the pages."""

from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

EXAMPLES = Path(__file__).parents[1] / "examples"


def on_files(files, config):
    for path in sorted([*EXAMPLES.glob("*.py"), EXAMPLES / "plugin" / "README.md"]):
        name = path.relative_to(EXAMPLES.parent).as_posix()
        file = File(f"../{name}", config.docs_dir, config.site_dir, False, dest_uri=f"{name}.txt")
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files

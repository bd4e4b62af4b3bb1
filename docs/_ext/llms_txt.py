"""Write llms.txt: what the pages are, in plain text, for programs that read documentation."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

SUMMARY = (
    "> Numerically stable angular-margin softmax losses for PyTorch (SphereFace, CosFace, ArcFace "
    "and others) that need no N x C matrix of logits. Angles are in radians."
)


def write(app: Sphinx, exception: Exception | None) -> None:
    """List each page with its title and its first sentence; link to its source."""
    if exception is not None or app.builder.name != "html":
        return
    lines = [f"# {app.config.project}", "", SUMMARY, "", "## Pages", ""]
    for name in sorted(app.env.found_docs):
        if name in app.config.master_doc:
            continue
        title = app.env.titles[name].astext()
        paragraph = next(app.env.get_doctree(name).findall(nodes.paragraph), None)
        text = "" if paragraph is None else f": {' '.join(paragraph.astext().split())}"
        lines.append(f"- [{title}]({name}.html){text}")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

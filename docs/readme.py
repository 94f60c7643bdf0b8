"Make README.md, and its picture, from nbs/index.ipynb, without hidden cells. (nbdev-readme wants Quarto.)"
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parents[1]
notebook = nbformat.read(root/'nbs/index.ipynb', as_version=4)
notebook.metadata.language_info = dict(name='python')
alt_texts = []
for cell in notebook.cells:
    if '#| echo: false' in cell.source: cell.metadata['transient'] = dict(remove_source=True)
    alt_texts += re.findall(r'^#\| fig-alt: *(.+)\n', cell.source, flags=re.M)
hidden = Config(RegexRemovePreprocessor=dict(enabled=True, patterns=[r'#\| hide']), ExtractOutputPreprocessor=dict(enabled=True))
text, resources = MarkdownExporter(config=hidden).from_notebook_node(notebook)
for i, ((name, picture), alt) in enumerate(zip(resources['outputs'].items(), alt_texts, strict=True), 1):
    file = f'docs/static/readme-{i}{Path(name).suffix}'
    (root/file).write_bytes(picture)
    text = re.sub(rf'!\[.*?\]\({re.escape(name)}\)', lambda _: f'![{alt}]({file})', text)
(root/'README.md').write_text(text.strip() + '\n')

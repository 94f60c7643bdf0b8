"Make README.md from nbs/index.ipynb, without hidden cells. (nbdev-readme wants Quarto.)"
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parents[1]
notebook = nbformat.read(root/'nbs/index.ipynb', as_version=4)
notebook.metadata.language_info = dict(name='python')
hidden = Config(RegexRemovePreprocessor=dict(enabled=True, patterns=[r'#\| hide']))
text, _ = MarkdownExporter(config=hidden).from_notebook_node(notebook)
(root/'README.md').write_text(text.strip() + '\n')

"The site: the notebooks as nbdev processes them, brought into the shape that Sphinx reads. Only what shows signatures is run."
import re
import shutil
from pathlib import Path

import nbformat
import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs

docs, processed, config = Path(__file__).parent, proc_nbs(n_workers=0), get_config()
pages, plain = docs/'_build/pages', docs/'_build/plain'  # what Sphinx reads, and the same as bare markdown

project, author, language, smartquotes = 'lth_nb', 'The lth_nb founders', 'en', False
extensions = ['myst_nb', 'sphinx_copybutton']
myst_enable_extensions = ['attrs_inline']
suppress_warnings = ['myst.header']  # a signature is a heading of the third level wherever it stands
nitpicky, nb_execution_mode = True, 'off'
nb_render_markdown_format = 'myst'  # the library's own values are tables in markdown
html_theme, html_title, html_extra_path, html_show_copyright = 'sphinx_book_theme', 'lth_nb', [str(plain)], False
html_static_path, html_css_files, html_favicon = [str(docs/'static')], ['site.css'], str(docs/'static/favicon.svg')
html_context, html_use_index = dict(default_mode='auto'), False
html_theme_options = dict(repository_url=config.git_url, use_repository_button=True, use_download_button=False, show_toc_level=2)

def docname(path): return path.relative_to(processed).with_name(re.sub(r'^\d+[a-z]?_', '', path.stem)).as_posix()

def label(page, name): return f'{page}/{re.sub("[A-Z]", lambda m: "-" + m[0].lower(), name)}'  # labels know no capitals, names do

def signature(page, cell):
    "What `show_doc` says of a name: with a label, short types and no addresses; nothing for the methods that only print."
    name, text = re.search(r'show_doc\((.+)\)', cell.source)[1], cell.outputs[0].data['text/markdown']
    if 'Return repr(self)' in text: return ''
    text = re.sub(r'\A---\n|^### .*\n', '', text, flags=re.M).replace('{target="_blank" style="float:right; font-size:smaller"}', '{.source}')
    text = re.sub(r'<function (\w+) at \w+>', r'\1', re.sub(r'\b(?:\w+\.)+([A-Z]\w*)', r'\1', text)).replace(':NoneType=None', '=None')
    shown.add(label(page, name))
    if 'Call self as a function' in text: return f'({label(page, name)})=\n<span id="{name.lower()}"></span>`{name}`'  # a criterion: a table says the rest
    return f'({label(page, name)})=\n### {name}\n\n<span id="{name.lower()}"></span>\n\n{text}'

def linked(text, here):
    "Links to notebooks and to names as links between pages; a name without an entry is met on its page."
    up, host = '../'*here.count('/'), re.escape(f'{config.doc_host}{config.doc_baseurl}/')
    def to_name(m):
        target = label(m[2], m[1].removesuffix('()'))
        return f'[`{m[1]}`]({"#" + target if target in shown else f"{up}{m[2]}.ipynb"})'
    text = re.sub(r'\]\((?!http)(?:[\w.]+/)*(\w+)\.ipynb\)', lambda m: f']({up}{by_stem.get(m[1], m[1])}.ipynb)', text)
    text = text.replace('](nbs/api)', f']({up}api/all.ipynb)')
    return re.sub(rf'\[`([^`]+)`\]\({host}([\w/]+)\.html#[\w.]*\)', to_name, text)

def as_page(path):
    "A processed notebook with its title and summary back, its signatures as text and a text for each picture."
    here, notebook, before = docname(path), nbformat.read(path, as_version=4), ''
    for cell in notebook.cells:
        if cell.cell_type == 'raw':
            front = yaml.safe_load(cell.source.replace('---', ''))
            notebook.cells[0] = nbformat.v4.new_markdown_cell(f'# {front["title"]}\n\n> {front["description"]}')
        elif cell.cell_type == 'markdown': before = re.sub(r'[`*#\[\]]|\(\S+\)', '', cell.source.split('\n\n')[-1]).replace('\n', ' ')
        elif 'show_doc(' in cell.source: cell.update(nbformat.v4.new_markdown_cell(signature(here, cell)))
        else:
            alt = re.search(r'^#\| fig-alt: *(.+)\n', cell.source, flags=re.M)
            if '#| echo: false' in cell.source: cell.metadata['tags'] = ['remove-input']
            cell.source = re.sub(r'^#\|.*\n', '', cell.source, flags=re.M)
            cell.metadata['mystnb'] = dict(image=dict(alt=alt[1] if alt else before))
    return here, notebook

notebooks = sorted(processed.rglob('*.ipynb'))
by_stem, shown = {p.stem: docname(p) for p in notebooks}, set()
for folder in (pages, plain): shutil.rmtree(folder, ignore_errors=True)
for here, notebook in [*map(as_page, notebooks)]:
    if here == 'index':
        reference = '\n'.join(docname(p) for p in notebooks if p.parent.name == 'api')
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell((docs/'index.md').read_text().replace('(reference)', reference)))
    for cell in notebook.cells:
        if cell.cell_type == 'markdown': cell.source = linked(cell.source, here)
        for o in cell.get('outputs', ()):
            if 'text/markdown' in o.get('data', ()): o.data['text/markdown'] = linked(o.data['text/markdown'], here)
    for folder in (pages, plain): (folder/here).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, pages/f'{here}.ipynb')
    texts = (f'```python\n{c.source}\n```' if c.cell_type == 'code' else c.source for c in notebook.cells)
    (plain/f'{here}.html.md').write_text('\n\n'.join(texts) + '\n')

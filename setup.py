"Package metadata from `settings.ini`, the one place it is written."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters='=')
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
# On PyPI nothing lies beside the README: its pictures and links lead to the repository.
readme = re.sub(r'(!?)\[([^\]]*)\]\((?!https?:|#)', lambda m: f'{m[1]}[{m[2]}](https://github.com/lth-nb/lth_nb/{"raw" if m[1] else "blob"}/main/', Path('README.md').read_text(encoding='utf-8'))

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license=cfg['license'],
    keywords=cfg['keywords'],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['lth_nb', 'lth_nb.*']),
    install_requires=cfg['requirements'].split(),
    extras_require=dict(dev=cfg['dev_requirements'].split(), bench=cfg['bench_requirements'].split()),
    entry_points={'nbdev': ['lth_nb=lth_nb._modidx:d'], 'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
)

"The built site in a browser: every page on a desk and on a phone, its search, its buttons, its pictures and its contrast."
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SITE = ROOT/'docs/_build/html'
WIDTHS, SCHEMES = (1280, 390), ('light', 'dark')
LEAST_CONTRAST = 4.5  # WCAG 2.2, criterion 1.4.3, for text of ordinary size


@pytest.fixture(scope='module')
def site():
    "The site, built from what is in the checkout now."
    try: import myst_nb, sphinx_book_theme, sphinx_copybutton  # noqa: F401
    except ImportError as e: _missing(f'the site was not built: {e.name} is not installed (pip install -e .[dev])')
    (ROOT/'docs/_build/pages').mkdir(parents=True, exist_ok=True)
    shutil.rmtree(SITE, ignore_errors=True)
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', 'docs', 'docs/_build/pages', SITE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return SITE


def _missing(reason): (pytest.fail if os.environ.get('LTH_NB_NEEDS_CHROMIUM') == '1' else pytest.skip)(reason)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def address(site):
    "The site as a server gives it; from a file, a browser would not let a page search."
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium; without it the tests skip, or fail where the environment says that it has to be there."
    try: from playwright.sync_api import sync_playwright
    except ImportError: _missing('the site was not opened in a browser: playwright is not installed (pip install playwright)')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None: _missing('the site was not opened in a browser: there is no Chromium (apt-get install chromium)')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()


def pages(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if '_static' not in p.parts)


# In the browser: the contrast of every text that is seen, against the first background behind it that is not transparent.
CONTRAST = '''() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const rgba = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data] }
  const over = (top, below) => [0, 1, 2].map(i => top[i]*top[3]/255 + below[i]*(1 - top[3]/255)).concat(255)
  const light = c => [0, 1, 2].map(i => c[i]/255).map(v => v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((sum, v, i) => sum + v*[.2126, .7152, .0722][i], 0)
  const behind = e => { let layers = []; for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor); layers.push(c); if (c[3] == 255) break }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 255]) }
  const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && e.getBoundingClientRect().width > 1
  const texts = [...document.querySelectorAll('main *, .bd-sidebar-primary a')].filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) && seen(e) && !e.closest('.headerlink, svg, button'))
  return texts.map(e => { const below = behind(e), ink = over(rgba(getComputedStyle(e).color), below), [a, b] = [light(ink), light(below)].sort((x, y) => y - x)
    return [(a + .05)/(b + .05), e.tagName + '.' + e.className, e.textContent.trim().slice(0, 40)] }) }'''


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('width', WIDTHS)
def test_every_page_reads_well(browser, site, address, width, scheme):
    context = browser.new_context(viewport=dict(width=width, height=844), color_scheme=scheme)
    folder, wrong = os.environ.get('LTH_NB_SCREENSHOTS'), []
    for name in pages(site):
        page = context.new_page()
        say = lambda what, name=name: wrong.append(f'{name}: {what}')
        page.on('console', lambda m: say(f'console: {m.text}') if m.type in ('error', 'warning') else None)
        page.on('pageerror', lambda e: say(f'error: {e}'))
        page.on('request', lambda r: say(f'asks for {r.url}') if not r.url.startswith((address, 'data:', 'blob:')) else None)
        page.on('response', lambda r: say(f'{r.status} for {r.url}') if r.status >= 400 else None)
        page.goto(address + name)
        page.wait_for_load_state('load')
        if folder: page.screenshot(path=Path(folder)/f'{name.replace("/", "-")}-{width}-{scheme}.png', full_page=True)
        if (wide := page.evaluate('document.documentElement.scrollWidth')) > width: say(f'is {wide} pixels wide')
        if page.evaluate('document.documentElement.dataset.theme') != scheme: say(f'does not follow the {scheme} scheme')
        for i, (alt, natural) in enumerate(page.locator('main img').evaluate_all('all => all.map(i => [i.alt, i.naturalWidth])')):
            if len(alt) < 30 or not natural: say(f'picture {i} has the text {alt!r}')
        low = sorted(c for c in page.evaluate(CONTRAST) if c[0] < LEAST_CONTRAST)
        if low: say(f'{len(low)} texts of low contrast, {low[:3]}')
        page.close()
    context.close()
    assert len(pages(site)) > 30 and not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('words, page_found', [('rewind', 'api/rewind.html'), ('SparsifyCallback', 'api/callback.html'), ('criterion', 'explains/how_to_add_a_criterion.html')])
def test_search_finds(browser, address, words, page_found):
    page = browser.new_page()
    page.goto(f'{address}search.html?q={words}')
    page.wait_for_selector(f'#search-results a[href*="{page_found}"]', timeout=20_000)
    page.close()


def test_search_is_reached_from_a_page(browser, address):
    page = browser.new_page(viewport=dict(width=1280, height=844))
    page.goto(address + 'index.html')
    page.keyboard.press('Control+k')
    page.locator('input[name=q]:visible').first.fill('SparsifyCallback')
    page.keyboard.press('Enter')
    page.wait_for_selector('#search-results a[href*="api/callback.html"]', timeout=20_000)
    page.close()


@pytest.mark.parametrize('width', WIDTHS)
def test_code_is_copied(browser, address, width):
    context = browser.new_context(viewport=dict(width=width, height=844), permissions=['clipboard-read', 'clipboard-write'])
    page = context.new_page()
    page.goto(address + 'tutorials/first_ticket.html')
    cells = page.locator('.cell_input div.highlight')
    assert cells.count() > 5 and page.locator('.cell_input button.copybtn').count() == cells.count()
    for i in (0, 2):
        cells.nth(i).hover()
        cells.nth(i).locator('button.copybtn').click()
        assert page.evaluate('navigator.clipboard.readText()').strip() == cells.nth(i).locator('pre').inner_text().strip()
    context.close()


def test_no_link_inside_is_dead(site):
    text = {name: (site/name).read_text() for name in pages(site)}
    names = {name: {unquote(n) for n in re.findall(r'\b(?:id|name)="([^"]+)"', t)} | {''} for name, t in text.items()}
    dead = set()
    for name, t in text.items():
        for link in re.findall(r'<(?:a|link|img|script)\b[^>]*?\b(?:href|src)="([^"]+)"', t):
            url = urlsplit(urljoin(f'http://here/{name}', link.replace('&amp;', '&')))
            if url.netloc != 'here' or url.scheme != 'http': continue
            path = unquote(url.path).lstrip('/') or 'index.html'
            if not (site/path).exists() or unquote(url.fragment) not in names.get(path, {'', unquote(url.fragment)}): dead.add((name, link))
    assert not dead, sorted(dead)


def test_every_module_and_name_has_its_place(site):
    "What the modules' own documentation and editors link to."
    from lth_nb._modidx import d
    for module, names in d['syms'].items():
        page = f'api/{module.removeprefix("lth_nb.")}.html'
        assert (site/page).exists() and (site/f'{page}.md').exists(), page
        public = [n for n in getattr(import_module(module), '__all__', ()) if f'{module}.{n}' in names]
        shown = set(re.findall(r'<span id="([^"]+)"', (site/page).read_text()))
        assert not [n for n in public if n.lower() not in shown], page

"The report in a browser: on a desk and on a phone, in the light and in the dark, with nothing to complain about."
import os
import shutil
from pathlib import Path

import pytest

from test_analysis import HOSTILE, example, with_masks
from lth_nb.results import Results

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def browser():
    "Headless Chromium; without it the tests skip, or fail where the environment says that it has to be there."
    missing = pytest.fail if os.environ.get('LTH_NB_NEEDS_CHROMIUM') == '1' else pytest.skip
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing('the report was not opened in a browser: playwright is not installed (pip install playwright)')
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if chromium is None: missing('the report was not opened in a browser: there is no Chromium (apt-get install chromium)')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def page_file(tmp_path_factory):
    "A report with everything a page can have: long and hostile names, many levels, failures, nested settings."
    folder = tmp_path_factory.mktemp('report')
    results = with_masks(example(n_seeds=6, levels=6), folder)
    names = {'imp': 'iterative magnitude pruning, rewound to initialisation', 'finetune': HOSTILE}
    rename = lambda r: {k: names.get(v, v) if isinstance(v, str) else v for k, v in r.items()}
    failed = tuple(dict(arm=names['imp'], level=n, seed=7, reason='RuntimeError: ' + 'x'*300) for n in (1, 2))
    info = dict(recipe='Recipe(model=LeNet, data=digits, epochs=5, optimizer=Adam, lr=0.002)\n' + 'y'*300, versions={'torch': '2.14', HOSTILE: HOSTILE}, seeds=list(range(60)))
    results = Results(tuple(map(rename, results.rows)), tuple(map(rename, results.history)), failed, folder, info)
    return results.report(folder/'report.html', title='Tickets on the digits, ' + 'z'*80)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_the_page_reads_well(browser, page_file, width, scheme):
    page = browser.new_page(viewport=dict(width=width, height=844), color_scheme=scheme, is_mobile=width < 500)
    complaints, requests = [], []
    page.on('console', lambda m: complaints.append(m.text))
    page.on('pageerror', lambda e: complaints.append(str(e)))
    page.on('request', lambda r: requests.append(r.url))
    page.goto(page_file.as_uri())
    page.wait_for_load_state()
    if folder := os.environ.get('LTH_NB_SCREENSHOTS'): page.screenshot(path=Path(folder)/f'report-{width}-{scheme}.png', full_page=True)
    assert not complaints and [r for r in requests if not r.startswith('data:')] == [page_file.as_uri()]
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    images = page.locator('img').evaluate_all('all => all.map(i => [i.alt, i.naturalWidth, i.getBoundingClientRect().right])')
    assert len(images) == 5 and all(len(alt) > 30 and natural > 0 and right <= width for alt, natural, right in images)
    boxes = page.locator('.scroll').evaluate_all('all => all.map(b => [b.scrollWidth > b.clientWidth, getComputedStyle(b).overflowX])')
    assert len(boxes) == 2 and all(overflow == 'auto' for _, overflow in boxes) and (width > 390 or any(scrolls for scrolls, _ in boxes))
    assert page.locator('main img[src="x"], script').count() == 0 and HOSTILE in page.inner_text('main')
    page.close()


def test_text_and_pictures_turn_light_in_the_dark(browser, page_file):
    "Ink against paper, as the browser draws it: the darkest and the lightest points of the first picture."
    from io import BytesIO
    from PIL import Image
    for scheme, paper in (('light', 255), ('dark', 16)):
        page = browser.new_page(viewport=dict(width=1280, height=844), color_scheme=scheme)
        page.goto(page_file.as_uri())
        picture = Image.open(BytesIO(page.locator('img').first.screenshot())).convert('L')
        darkest, lightest = picture.getextrema()
        assert picture.getpixel((2, 2)) == pytest.approx(paper, abs=4)
        assert (darkest < 60) if scheme == 'light' else (lightest > 200)
        page.close()

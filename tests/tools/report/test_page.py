"""The page in a browser: by mouse, by keyboard and by touch, light and dark, on a phone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_up import detected, made_up

pytest.importorskip("hotcoco")
playwright = pytest.importorskip("playwright.sync_api")

from gfl_jax.detectors.sides import Sides
from gfl_jax.results import Result
from gfl_jax.tools.report.costs import costs
from gfl_jax.tools.report.errors import Objects, judge
from gfl_jax.tools.report.gallery import Pictures, entry_of
from gfl_jax.tools.report.numbers import confusion, numbers_of
from gfl_jax.tools.report.page import page, report_sections

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine"),
]

CAT, DOG = 0, 1
EVIL = 'dog</script><img src=x onerror="document.title=1">'
NAMES = ["cat", EVIL]


def one_image(name, *objects_labels, found=()):
    """An image of 200 x 100 as the page knows it; found: (box, label, score)."""
    boxes = np.array([box for box, _ in objects_labels], float).reshape(-1, 4)
    labels = np.array([label for _, label in objects_labels], int)
    objects = Objects(boxes, labels, np.zeros(len(labels), bool))
    found_boxes = np.array([box for box, *_ in found], float).reshape(-1, 4)
    found_labels = np.array([label for _, label, _ in found], int)
    positions = found_boxes[..., None] + np.linspace(-4, 4, 5)
    probabilities = np.broadcast_to([0.1, 0.2, 0.4, 0.2, 0.1], positions.shape)
    result = Result(
        "",
        np.full((100, 200, 3), 90, np.uint8),
        found_boxes,
        np.array([score for *_, score in found]),
        found_labels,
        [NAMES[label] for label in found_labels],
        found_labels.tolist(),
        Sides(positions, probabilities),
    )
    judged = judge(objects, found_boxes, found_labels)
    entry = entry_of(result, objects, judged, 0.3)
    pictures = Pictures(Path("page.html"), [name], 200)
    pictures.keep(result.image)
    return pictures.beside([entry])[0]


IMAGES = [
    one_image("all right.jpg", ((20, 20, 80, 80), CAT), found=[((20, 20, 80, 80), CAT, 0.9)]),
    one_image("a miss.jpg", ((20, 20, 80, 80), CAT)),
    one_image(
        "worst.jpg",
        ((20, 20, 80, 80), CAT),
        ((120, 20, 180, 80), CAT),
        found=[((22, 20, 82, 80), DOG, 0.8), ((150, 20, 190, 80), CAT, 0.35)],
    ),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return written(tmp_path_factory.mktemp("page") / "report.html", IMAGES)


def written(file, images, versions=("",)):
    truth, results = made_up(0, classes=2)
    found = detected(truth, results)
    numbers = numbers_of(truth, results)
    sections = report_sections(
        numbers, costs(found, 2), found, confusion(truth, results, 0.3), NAMES, 0.3
    )
    text = page(EVIL, {"images": str(len(images))}, sections, NAMES, images, 0.3, versions)
    file.write_text(text, "utf-8")
    return file


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, file):
    """Opens the page; afterwards nothing was fetched and no script failed."""
    contexts, problems = [], []

    def opened(address=file, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text))
        tab.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:")) or problems.append(request.url)
            ),
        )
        tab.goto(f"file://{address}")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def captions(tab):
    return tab.locator(".picture figcaption").all_inner_texts()


def test_the_worst_pictures_come_first_and_those_without_errors_not_at_all(open_page):
    tab = open_page()
    assert captions(tab) == ["worst.jpg: 1 class, 1 localization", "a miss.jpg: 1 missed"]
    assert tab.locator("#place").inner_text() == "1 to 2 of 2 images"
    assert tab.title() == EVIL, "names are text, never code"


def test_a_kind_of_error_is_chosen_in_the_table_or_the_list(open_page):
    tab = open_page()
    tab.get_by_role("button", name="missed").click()
    assert captions(tab) == ["a miss.jpg: 1 missed"]
    tab.locator("#kind").select_option("localization")
    assert captions(tab) == ["worst.jpg: 1 class, 1 localization"]
    tab.locator("#kind").select_option("duplicate")
    assert captions(tab) == []
    assert tab.locator("#place").inner_text() == "no such image"


def test_a_class_and_a_score_are_chosen(open_page):
    tab = open_page()
    tab.locator("#label").select_option("1")
    assert captions(tab) == ["worst.jpg: 1 class, 1 localization"]
    tab.locator("#label").select_option("-1")
    tab.locator("#score").fill("0.5")
    assert "worst.jpg: 1 class" in captions(tab)


def test_pointing_at_a_box_says_what_it_is(open_page):
    tab = open_page()
    assert tab.locator("#card").is_hidden()
    tab.locator(".picture svg").first.scroll_into_view_if_needed()
    place = tab.locator(".picture svg").first.bounding_box()
    scale = place["width"] / 200
    tab.mouse.move(place["x"] + 185 * scale, place["y"] + 50 * scale)
    said = tab.locator("#card").inner_text()
    assert "cat 0.35" in said
    assert "error: localization; IoU 0.43 with cat" in said
    assert "left 150 ± 2.2 px" in said  # sqrt(0.2 * 16 + 0.4 * 4) = 2.19
    assert tab.locator("#card svg").count() == 4
    assert tab.locator("#card line.true").count() > 0
    tab.mouse.move(place["x"] + 100 * scale, place["y"] + 5 * scale)
    assert tab.locator("#card").is_hidden()


def test_everything_is_reached_by_keyboard(open_page):
    tab = open_page()
    tab.locator("#next").focus()
    tab.keyboard.press("Tab")  # the pager's buttons are disabled: there is one page
    for _ in range(60):
        if tab.evaluate("document.activeElement.matches('.picture svg')"):
            break
        tab.keyboard.press("Tab")
    said = [tab.locator("#card").inner_text()]
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
        said.append(tab.locator("#card").inner_text())
    assert [text.splitlines()[0] for text in said] == ["cat", "cat", f"{EVIL} 0.80", "cat 0.35"]
    assert "annotated object" in said[0]
    tab.keyboard.press("ArrowLeft")
    assert "0.80" in tab.locator("#card").inner_text()
    tab.keyboard.press("Escape")
    assert tab.locator("#card").is_hidden()


def test_a_tap_says_what_a_box_is_on_a_phone_whose_width_is_enough(open_page):
    tab = open_page(width=390, has_touch=True)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    picture = tab.locator(".picture svg").first
    picture.scroll_into_view_if_needed()
    place = picture.bounding_box()
    scale = place["width"] / 200
    tab.touchscreen.tap(place["x"] + 50 * scale, place["y"] + 50 * scale)
    assert "0.80" in tab.locator("#card").inner_text()
    card = tab.locator("#card").bounding_box()
    assert card["x"] >= 0 and card["x"] + card["width"] <= 390
    assert card["y"] + card["height"] <= 800


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_light_and_dark(open_page, scheme):
    """WCAG 2.2 asks for a contrast of 4.5 for text."""
    tab = open_page(color_scheme=scheme)
    colors = tab.evaluate(
        "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
        ".concat(getComputedStyle(document.querySelector('p')).color)"
    )
    ink, paper, soft = (luminance(color) for color in colors)
    assert (paper > 0.5) == (scheme == "light")
    for text in (ink, soft):
        high, low = max(text, paper), min(text, paper)
        assert (high + 0.05) / (low + 0.05) > 4.5


def luminance(color):
    """Of a colour such as rgb(1, 2, 3), as in WCAG 2.2."""
    values = np.array(color[4:-1].split(","), float) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_two_detectors_stand_side_by_side_where_they_differ(open_page, tmp_path):
    better = one_image(
        "worst.jpg",
        ((20, 20, 80, 80), CAT),
        ((120, 20, 180, 80), CAT),
        found=[((22, 20, 82, 80), CAT, 0.8)],
    )
    images = [image | {"versions": image["versions"] * 2} for image in IMAGES[:2]]
    images.append(IMAGES[2] | {"versions": IMAGES[2]["versions"] + better["versions"]})
    tab = open_page(written(tmp_path / "two.html", images, ("old", "new")))
    assert captions(tab) == [
        "old, worst.jpg: 1 class, 1 localization",
        "new, worst.jpg: 1 missed",
    ]
    left, right = (tab.locator(".picture svg").nth(i).bounding_box() for i in (0, 1))
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]


def test_five_thousand_images_are_paged_through(open_page, tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for number in range(5000):
        places = rng.integers(0, 100, (8, 2))
        boxes = [((x, y, x + 60, y + 60), int(rng.integers(2))) for x, y in places.tolist()]
        found = [(box, int(rng.integers(2)), 0.9 - i / 20) for i, (box, _) in enumerate(boxes)]
        images.append(one_image(f"{number}.jpg", *boxes, found=found))
    big = written(tmp_path / "big.html", images)
    tab = open_page(big)
    assert tab.locator(".picture").count() == 24
    loading = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert loading < 15_000, "about 1.5 s on one free core"
    tab.get_by_role("button", name="Next").click()
    assert tab.locator("#place").inner_text().startswith("25 to 48 of ")
    tab.get_by_role("button", name="Previous").click()
    assert tab.locator("#back").is_disabled()

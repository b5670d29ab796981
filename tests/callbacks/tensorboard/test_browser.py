"""TensorBoard in a real browser shows what the monitor writes: Chromium opens every tab of a real run."""

import importlib.util
import shutil
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="needs selenium, of the extra `docs`")
pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra `paper`")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("pictures", Path(__file__).parents[3] / "docs" / "pictures.py")
pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pictures)

LAYERS = ["first", "hidden.0", "hidden.1", "last"]
RUNS = ["coefficient=0", "coefficient=0.3"]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Serve two short runs, one without a penalty."""
    runs = tmp_path_factory.mktemp("logs") / "runs"
    for coefficient in (0.0, 0.3):
        pictures.train(runs, coefficient, max_epochs=2)
    with pictures.tensorboard(runs) as served:
        yield served


@pytest.fixture(scope="module")
def driver():
    with pictures.chromium(1900, 2000) as opened:
        yield opened


@pytest.fixture
def shows(driver, address):
    """Open a tab and wait until `read` returns `expected`; say what it returned where it never does."""

    def compare(tab, read, expected):
        seen = None

        def ready():
            nonlocal seen
            seen = read()
            return seen == expected

        try:
            pictures.open_tab(driver, f"{address}/#{tab}", ready)
        except TimeoutError:
            assert seen == expected

    return compare


@pytest.fixture
def find(driver):
    return lambda selector: pictures.elements(driver, selector)


def inside(element):
    """Return the source of what an element draws, in its shadow tree."""
    return element.parent.execute_script("return arguments[0].shadowRoot.innerHTML", element)


def texts(elements):
    """Return each element's text, read once: it may be gone, or another, the next time."""
    return [element.text for element in elements]


def tag_of(text):
    return next((line.removeprefix("tag: ") for line in text.splitlines() if line.startswith("tag: ")), None)


def test_scalars_by_tag(shows, find):
    kinds = {"bound", "bound_upper", "penalty", "certified", "lower", "estimate"}
    # The charts that match the filter come first, in a group of their own; each is an SVG with a line.
    tab = "scalars&tagFilter=%5Elipschitz%2F%5B%5E%2F%5D%2B%24"
    shows(
        tab,
        lambda: {tag_of(text) for text in texts(find("tf-scalar-card")) if "lipschitz/" in text},
        {f"lipschitz/{kind}" for kind in kinds},
    )
    shows(tab, lambda: ['class="line"' in inside(chart) for chart in find("vz-line-chart2")][:6], [True] * 6)


def test_custom_scalars_hold_all_layers_in_one_chart_and_the_intervals(shows, find):
    cards = "tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card"
    # A card names its chart, and how many series it found: layers times runs, and one margin a run.
    shows(
        "custom_scalars",
        lambda: {text.splitlines()[0]: text.splitlines()[-1] for text in texts(find(cards)) if text},
        {
            "spectral norms": f"Matches ({len(LAYERS) * len(RUNS)})",
            "parts of log bound": f"Matches ({len(LAYERS) * len(RUNS)})",
            **dict.fromkeys(("weight norms", "stable ranks", "update ratios"), f"Matches ({len(LAYERS) * len(RUNS)})"),
            "bound, with its upper bound": f"Matches ({len(RUNS)})",
            "certified interval (band), plain bound (line)": f"Matches ({len(RUNS)})",
        },
    )


def test_images_are_drawn(shows, find):
    def drawn():
        loaders = [loader.text.splitlines() for loader in find("tf-image-loader")]
        return sorted((lines[0], lines[1]) for lines in loaders if len(lines) > 1)

    wanted = sorted((f"lipschitz/{kind}", run) for kind in ("spectral_norms", "log_shares") for run in RUNS)
    shows("images", drawn, wanted)

    def loaded():
        images = find("img[src*=individualImage]")
        return len({i.get_attribute("src") for i in images if i.get_property("naturalWidth") > 800})

    shows("images", loaded, len(wanted))


def test_histograms_of_each_layers_spectrum(shows, find):
    def drawn():
        headings = [h.text.splitlines() for h in find("tf-card-heading")]
        charts = [inside(chart).count('class="histogram"') for chart in find("vz-histogram-timeseries")]
        return sorted((lines[0], lines[1]) for lines in headings if len(lines) > 1), charts

    wanted = sorted((f"lipschitz/spectrum/{layer}", run) for layer in LAYERS for run in RUNS)
    shows("histograms", drawn, (wanted, [2] * len(wanted)))  # two epochs


def test_hparams_compare_the_runs(shows, find, address):
    columns = ["lipschitz/coefficient", "lipschitz/penalty", "val_loss", "lipschitz/certified", "lipschitz/lower"]

    def table():
        texts = [cell.text for cell in find("vaadin-grid-cell-content")]
        return {text for text in texts if text in {*columns, *RUNS, "none", "softplus_log"}}

    shows("hparams", table, {*columns, *RUNS, "none", "softplus_log"})
    # The user's own hyperparameters are offered too; only the first five are ticked.
    shows("hparams", lambda: {"lr", "n_layers"} & set(texts(find("paper-checkbox"))), {"lr", "n_layers"})

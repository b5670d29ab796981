"""The pictures of the TensorBoard guide: trains, opens TensorBoard in headless Chromium, and photographs its tabs.

    python docs/pictures.py docs/pictures

Needs Chromium with its driver, and the packages of the extra `docs`. `tests/callbacks/tensorboard/test_browser.py`
opens the same pages and checks what they show.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lightning_lip import CertifiedValidation, LipschitzMonitor, LipschitzPenalty


class Regressor(L.LightningModule):
    """A chain of `n_layers` linear layers on 4 features; orthogonal at first, so that a deep one trains."""

    def __init__(self, n_layers: int = 4, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 16)
        self.hidden = nn.ModuleList(nn.Linear(16, 16) for _ in range(n_layers - 2))
        self.last = nn.Linear(16, 1)
        self.example_input_array = torch.zeros(2, 4)
        for layer in self.hidden:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.last(x)

    def training_step(self, batch):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def train(folder: Path, coefficient: float, n_layers: int = 4, max_epochs: int = 15) -> Path:
    """Train one run, named after its coefficient, with every chart of the monitor; return its folder."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(640, 4, generator=generator)
    data = torch.utils.data.TensorDataset(x, 2 * x.sin().sum(1, keepdim=True))
    fit, validation = torch.utils.data.random_split(data, [512, 128], generator=generator)
    monitor = LipschitzMonitor(certified=CertifiedValidation((0.1,), task="regression"))
    penalty = [LipschitzPenalty(coefficient, "softplus_log")] if coefficient else []
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        log_every_n_steps=4,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        logger=TensorBoardLogger(folder, name="", version=f"coefficient={coefficient:g}"),
        callbacks=[monitor, ModelCheckpoint(monitor="val_loss"), *penalty],
    )
    loaders = (torch.utils.data.DataLoader(part, batch_size=32) for part in (fit, validation))
    trainer.fit(Regressor(n_layers), *loaders)
    return Path(trainer.logger.log_dir)


@contextlib.contextmanager
def tensorboard(folder: Path, seconds: float = 60.0) -> Iterator[str]:
    """Serve a folder of logs on a free port of the loopback interface; yields the address."""
    # Its working directory is above the logs, so that the pages show their name and not their whole path.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name, "--host", "127.0.0.1", "--port", "0"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=folder.parent) as server,
    ):
        try:
            end = time.monotonic() + seconds
            while True:
                log.seek(0)
                said = log.read().decode()
                # It takes a free port, and says which.
                address = re.search(r"http://127\.0\.0\.1:\d+(?=/)", said)
                if address and _has_runs(address[0]):
                    break
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"TensorBoard serves no runs: {said}")
                time.sleep(0.2)
            yield address[0]
        finally:
            server.terminate()


def _has_runs(address: str) -> bool:
    try:
        # No proxy: it would be asked for an address of its own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{address}/data/runs", timeout=5) as reply:
            return bool(reply.read().strip() != b"[]")
    except (OSError, http.client.HTTPException):
        return False


@contextlib.contextmanager
def chromium(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """Open headless Chromium with an empty profile; yields Selenium's driver."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "disable-dev-shm-usage",
            f"user-data-dir={profile}",
            f"window-size={width},{height}",
        ):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


ELEMENTS = """
const found = [];
const walk = root => {
  for (const node of root.querySelectorAll('*')) {
    if (node.matches(arguments[0])) found.push(node);
    if (node.shadowRoot) walk(node.shadowRoot);
  }
};
walk(document);
return found;
"""


def elements(driver: Any, selector: str) -> list[Any]:
    """Return the elements that match a CSS selector, also inside the shadow trees that TensorBoard is made of."""
    found: list[Any] = driver.execute_script(ELEMENTS, selector)
    return found


def open_tab(driver: Any, tab: str, ready: Callable[[], bool], seconds: float = 60.0) -> None:
    """Open a page of TensorBoard afresh and wait for it.

    Raises:
        TimeoutError: If it is not ready in time.
    """
    from selenium.common.exceptions import WebDriverException

    driver.get("about:blank")  # a change behind the # alone does not load the page
    driver.get(tab)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # The page replaces elements while it is built, and half-built ones have no inside yet.
        with contextlib.suppress(WebDriverException):
            if ready():
                return
        time.sleep(0.2)
    raise TimeoutError(f"{tab} did not show what was expected within {seconds:g} s.")


def save(png: bytes, path: Path) -> None:
    """Save a picture in 128 colours: a quarter of the size, and no difference to be seen."""
    from PIL import Image

    Image.open(io.BytesIO(png)).convert("RGB").quantize(128).save(path, optimize=True)


def last_image(run: Path, tag: str) -> bytes:
    """Return the last image of a tag in a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    image: bytes = events.Images(tag)[-1].encoded_image_string
    return image


PAGES = {
    # name: what follows the #, width and height of the window, an element that the page must show, and how many
    "scalars": (
        "scalars&tagFilter=lipschitz%2F(bound%7Cpenalty)&_smoothingWeight=0",
        1280,
        560,
        "tf-scalar-card",
        3,
    ),
    "custom_scalars": ("custom_scalars&_smoothingWeight=0", 1100, 900, "vz-line-chart2", 4),
    "images": ("images&regexInput=0.3", 1100, 620, "img[src*=individualImage]", 2),
    "histograms": ("histograms&regexInput=0.3", 1100, 700, "vz-histogram-timeseries", 4),
    "hparams": ("hparams", 2060, 500, "vaadin-grid-cell-content", 40),
}


def main(folder: Path) -> None:
    """Make all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        runs = Path(name) / "runs"
        for coefficient in (0.0, 0.03, 0.3):
            train(runs, coefficient)
        deep = train(Path(name) / "deep", 0.1, n_layers=100, max_epochs=10)
        save(last_image(deep, "lipschitz/spectral_norms"), folder / "heat_map_100_layers.png")
        save(last_image(deep, "lipschitz/log_shares"), folder / "log_shares_100_layers.png")
        with tensorboard(runs) as address:
            for page, (tab, width, height, selector, count) in PAGES.items():
                with chromium(width, height) as driver:
                    ready = lambda: len(elements(driver, selector)) >= count  # noqa: B023, E731
                    open_tab(driver, f"{address}/#{tab}", ready)
                    time.sleep(3)  # charts fade in
                    save(driver.get_screenshot_as_png(), folder / f"{page}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

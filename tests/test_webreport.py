"""Reports of runs and pages of certificates as people see them: in a real browser, from disk."""

import dataclasses
import json
import re
import shutil
from typing import Any

import numpy as np
import pytest
from support import ROOT, stop_in_step, trainer

import vqtrain.agreement
import vqtrain.run.step
import vqtrain.run.trainer
import vqtrain.run.webreport
from vqref.agreement.report import Check, Report
from vqref.errors import CommandError, ParityError
from vqref.host import webpage
from vqref.host.interrupts import Interrupted
from vqtrain.run.folder import RunFolder, latest_state
from vqtrain.run.pictures import MOST_RANKS, use_of_codes
from vqtrain.run.webreport import PICTURE_BYTES, REPORT

HOSTILE = "<script>document.title = 'pwned'</script><img src=https://evil.example/x.png>"

DRAWN = {"pictures": True}
"""The run draws pictures, and so writes its report."""

BAD = ("error", "warning")
"""Kinds of lines in a browser's console that mean a fault; Bokeh's start writes other kinds."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, many_images):
    """The folder of a run of three epochs."""
    place = tmp_path_factory.mktemp("report")
    run = trainer(place, many_images, epochs=3, work=DRAWN)
    run.provenance["data"] = {"source": HOSTILE}
    run.work.folder.write_options({"run": {"data": HOSTILE, "crop": True}})
    run.run()
    return place / "run"


def opened(chromium, path, wrong, **how):
    """Opens a file in a browser, from disk.

    wrong: takes what goes wrong in it, and each request to an address.
    """
    page = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **how}).new_page()
    own = (path.as_uri(), "data:")
    page.on("console", lambda said: said.type in BAD and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda one: one.url.startswith(own) or wrong.append(one.url))
    page.goto(path.as_uri())
    return page


@pytest.fixture
def look(chromium):
    """Opens a page; nothing may go wrong in it."""
    pages: list[Any] = []
    wrong: list[str] = []

    def go(path, **how):
        pages.append(opened(chromium, path, wrong, **how))
        if "dataset.drawn" in path.read_text():
            pages[-1].wait_for_selector("body[data-drawn]")
        return pages[-1]

    yield go
    for page in pages:
        page.context.close()
    assert wrong == []


def data_of(path):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path)
    return json.loads(found)


def test_a_report_holds_the_figures_of_its_run(finished):
    text = (finished / REPORT).read_text()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    data = data_of(text)
    assert data["epochs"] == [1, 2, 3]
    panels = {panel["name"]: panel["lines"] for panel in data["panels"]}
    assert {"bound", "perplexity", "nmse", "psnr", "ssim", "oracle_error_over_allowed"} <= {*panels}
    training, held_out = panels["bound"]
    assert (training["name"], held_out["name"]) == ("training", "held out")
    assert training["values"] == [line["bound"] for line in lines]
    assert held_out["values"] == [line["held_out"]["bound"] for line in lines]
    for line in lines:
        assert f"<td>{line['held_out']['bound']:,.2f}</td>" in text
    for check in lines[-1]["oracle"]["checks"]:
        assert f'<th scope="row">{check["stage"]}</th>' in text
        if check["max_error"] is not None:
            assert f"<td>{check['max_error']:.1e}</td><td>{check['allowed']:.1e}</td>" in text
    assert "Finished: 3 epochs." in text
    assert f"python -m vqdeploy export {finished.parent}/model.pt" in text


def test_a_report_shows_each_epochs_pictures_and_use_of_codes(finished):
    shown = data_of((finished / REPORT).read_text())["shown"]
    assert [one["epoch"] for one in shown] == [1, 2, 3]
    for one in shown:
        assert sorted(one["pictures"]) == ["codebook", "reconstructions", "samples"]
        use = one["use"]
        assert sum(use["shares"]) == pytest.approx(1)
        assert use["told"].startswith(f"{use['used']} of 8 codes used, perplexity ")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [one["use"]["used"] for one in shown] == [line["codes_used"] for line in lines]


def test_a_long_run_shows_some_epochs_and_always_the_last(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for epoch in range(1, 41):
        folder.picture(epoch, "samples").write_bytes(bytes(PICTURE_BYTES // 12))
    found = vqtrain.run.webreport._shown(folder, PICTURE_BYTES)
    assert [one["epoch"] for one in found] == [*range(4, 41, 4)]


@pytest.mark.parametrize("codes", [1, 8, MOST_RANKS, 16_384])
def test_the_use_of_any_codebook_is_kept_in_few_figures(codes):
    hits = np.random.default_rng(0).permutation(np.arange(1, codes + 1))
    use = use_of_codes(np.append(hits, 0))
    assert (use["codes"], use["used"]) == (codes + 1, codes)
    shares = np.sort(hits)[::-1] / hits.sum()
    assert use["shares"] == shares[np.array(use["ranks"]) - 1].tolist()
    assert use["ranks"][0] == 1
    assert use["ranks"][-1] == codes
    assert len(use["ranks"]) == codes if codes <= MOST_RANKS else len(use["ranks"]) < MOST_RANKS
    assert use["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_hostile_settings_are_text(finished, look):
    text = (finished / REPORT).read_text()
    assert "<script>document.title" not in text
    assert "<img src=https" not in text
    assert "&lt;script&gt;document.title" in text
    page = look(finished / REPORT)
    assert page.title() == "run"
    assert HOSTILE in page.inner_text("main")


def test_what_slipped_into_a_page_does_not_run_and_is_noticed(finished, chromium, tmp_path):
    (tmp_path / "forged.html").write_text(
        (finished / REPORT).read_text().replace("</main>", HOSTILE + "</main>")
    )
    wrong: list[str] = []
    page = opened(chromium, tmp_path / "forged.html", wrong)
    assert page.title() == "run"
    page.context.close()
    assert {"script", "image"} <= {
        word for line in wrong for word in re.findall("script|image", line)
    }
    assert all("Content Security Policy" in line or "evil.example" in line for line in wrong)


def test_a_slider_turns_the_pages_by_keyboard_and_curves_answer_a_pointer(finished, look):
    page = look(finished / REPORT)
    shown = data_of((finished / REPORT).read_text())["shown"]
    picture = page.locator("#picture-reconstructions")
    assert picture.get_attribute("src") == shown[2]["pictures"]["reconstructions"]
    page.focus("#epoch")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert picture.get_attribute("src") == shown[0]["pictures"]["reconstructions"]
    assert picture.get_attribute("alt").endswith("after epoch 1")
    assert page.inner_text("#use-told") == shown[0]["use"]["told"]
    assert page.get_attribute("#epoch", "aria-valuetext") == "epoch 1"
    curve = page.locator("#curve-bound")
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
    tooltip = page.locator(".bk-tooltip-content")
    tooltip.wait_for()
    assert re.search(r"training:?\s*[\d,.]+\s*held out:?\s*[\d,.]+", tooltip.inner_text())


@pytest.fixture(scope="module")
def certificate(bundle, tmp_path_factory):
    """The page of a verification of ``bundle``."""
    from vqdeploy.__main__ import main

    path = tmp_path_factory.mktemp("certificate") / "certificate.html"
    assert main(["verify", str(bundle), "--html", str(path), "--device", "cpu"]) == 0
    return path


PAGES = ("finished", "certificate")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_no_finding_of_accessibility(request, look, barriers, name, scheme):
    path = request.getfixturevalue(name)
    path = path / REPORT if path.is_dir() else path
    page = look(path, color_scheme=scheme, bypass_csp=True)
    if page.locator("summary").count():
        page.click("summary")
    assert barriers(page) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_all_without_scrolling_aside(request, look, name):
    path = request.getfixturevalue(name)
    path = path / REPORT if path.is_dir() else path
    page = look(path, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_look_for_barriers_finds_one(look, barriers, certificate, tmp_path):
    text = certificate.read_text().replace('<html lang="en">', "<html>")
    (tmp_path / "bare.html").write_text(text.replace("</main>", '<img src="data:,"></main>'))
    page = look(tmp_path / "bare.html", bypass_csp=True)
    assert {("html-has-lang", "serious"), ("image-alt", "critical")} <= {*barriers(page)}


def stopped(tmp_path, many_images, monkeypatch, when):
    """Stops a run of two epochs of five steps in the given step, counted from 1."""
    stop_in_step(monkeypatch, when)
    run = trainer(tmp_path, many_images, work=DRAWN)
    with pytest.raises(Interrupted):
        run.run()
    run.work.folder.release()
    monkeypatch.undo()


def test_a_run_that_was_stopped_says_so_and_one_that_went_on_has_every_epoch(
    tmp_path, many_images, monkeypatch
):
    stopped(tmp_path, many_images, monkeypatch, 7)
    text = (tmp_path / "run" / REPORT).read_text()
    assert "Interrupted in epoch 2, step 2, and saved." in text
    assert f"--config {tmp_path}/run/options.toml --resume {tmp_path}/run" in text
    assert data_of(text)["epochs"] == [1]
    state, _, _ = latest_state(tmp_path / "run")
    trainer(tmp_path, many_images, state=state, work=DRAWN).run()
    text = (tmp_path / "run" / REPORT).read_text()
    data = data_of(text)
    assert "Finished: 2 epochs." in text
    assert data["epochs"] == [1, 2]
    assert [one["epoch"] for one in data["shown"]] == [1, 2]
    assert all(one["use"] for one in data["shown"])


def test_a_run_stopped_before_its_first_epochs_end_has_no_report(
    tmp_path, many_images, monkeypatch
):
    stopped(tmp_path, many_images, monkeypatch, 2)
    assert not (tmp_path / "run" / REPORT).exists()


def test_a_report_that_cannot_be_written_is_a_line_and_the_run_ends_well(
    tmp_path, many_images, monkeypatch
):
    def failing(*_):
        raise RuntimeError("no luck")

    said: list[str] = []
    monkeypatch.setattr(vqtrain.run.webreport, "page_of", failing)
    model = trainer(tmp_path, many_images, said, epochs=1, work=DRAWN).run()
    assert model.metrics["epoch"] == 1
    assert said.count("report.html is not written: RuntimeError: no luck") == 2


@pytest.mark.parametrize("kind", ["disagrees", "diverged"])
def test_a_run_that_failed_says_so_with_the_check_that_failed(
    tmp_path, many_images, monkeypatch, kind
):
    check = vqtrain.agreement.check_against_oracle
    calls = []

    def failing(*arguments, **how):
        calls.append(1)
        if len(calls) < 3:  # before the first step, and after the first epoch
            return check(*arguments, **how)
        if kind == "diverged":
            raise ValueError("a stage that is not finite")
        bad = Check("decoder", "float32", 7, 2, 3.0, 1.0, 1e-5, problem="2 values beyond it")
        return Report((bad,), 4)

    monkeypatch.setattr(vqtrain.run.trainer, "check_against_oracle", failing)
    with pytest.raises(ParityError if kind == "disagrees" else CommandError):
        trainer(tmp_path, many_images, work=DRAWN).run()
    text = (tmp_path / "run" / REPORT).read_text()
    assert '<p class="verdict wrong">Failed: the ' in text
    assert ("The trainer disagrees with the NumPy oracle." in text) is (kind == "disagrees")
    assert ("decoder: 2 values beyond it" in text) is (kind == "disagrees")


def test_a_certificate_shows_the_verdict_first_and_each_figure_beside_its_bound(
    certificate, bundle, look
):
    page = look(certificate)
    verdict = page.inner_text("header p.verdict")
    assert verdict == "Verified: what runs is what was trained."
    manifest = json.loads((bundle / "manifest.json").read_text())
    words = page.inner_text("main")
    assert all(entry["sha256"] in words for entry in manifest["files"].values())
    rows = page.locator("table", has_text="share of the bound").locator("tbody tr")
    stages = [row.split("\t")[0] for row in rows.all_inner_texts()]
    assert {"encoder", "quantizer", "tokenizer", "decoder", "graphs", "weights"} <= {*stages}
    encoder = rows.nth(stages.index("encoder")).inner_text().split("\t")
    assert float(encoder[2]) < float(encoder[3]) == 1e-5


def test_a_certificate_of_a_wrong_bundle_says_so_first(bundle, tmp_path, run):
    from support import add, sign, weight_changed

    shutil.copytree(bundle, tmp_path / "wrong")
    weight_changed(tmp_path / "wrong", "decoder", "decoder.conv1.weight", add((0, 0, 0, 0), 0.5))
    sign(tmp_path / "wrong")
    words = ("-m", "vqdeploy", "verify", "wrong", "--html", "c.html", "--device", "cpu")
    done = run(*words, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (4, "")
    assert done.stdout.endswith("wrote c.html\n")
    text = (tmp_path / "c.html").read_text()
    assert '<p class="verdict wrong">NOT verified: ' in text
    assert '<tr class="wrong"><th scope="row">weights</th>' in text


def test_figures_of_every_kind_are_written():
    assert [webpage.percent(part) for part in (0, 0.12, 0.004, 1e-5, 2.5, np.inf)] == [
        "0 %",
        "12 %",
        "0.4 %",
        "below 0.1 %",
        "250 %",
        "not finite",
    ]
    infinite = dataclasses.asdict(Check("x", "float32", 1, 1, None, None, 1e-5, problem="NaN"))
    words = webpage.checks("c", {"checks": [infinite]})
    assert "--part: 100.0%" in words
    assert "not finite" in words
    assert webpage.embedded("x", {"a": [np.inf, "</script>"]}) == (
        '<script type="application/json" id="x">{"a":[null,"\\u003c/script>"]}</script>'
    )

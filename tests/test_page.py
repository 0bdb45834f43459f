"""The page as people use it: in a real browser (without a window), from a plain web server."""

import dataclasses
import functools
import http.server
import io
import json
import re
import shutil
import subprocess
import threading
from collections import Counter

import mixed_pictures
import numpy as np
import pytest
from PIL import Image
from support import RESIDUAL, ROOT, prior_params, small_model

from vqdeploy import Codec, site
from vqdeploy.bundle import Bundle
from vqdeploy.export import export
from vqdeploy.graphs.build import GraphOptions
from vqdeploy.proof.elsewhere import golden_checks
from vqref import families
from vqref.agreement import check_indices
from vqref.preprocessing import Preprocessing
from vqref.prior import Prior, transformer
from vqref.spec import CODEBOOK

READY = "body[data-seconds]"


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with onnxruntime-web in the version that the page names."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("packages")
    wanted = json.loads((site.SOURCE / "package.json").read_text())["dependencies"]
    names = [f"{name}@{version}" for name, version in wanted.items()]
    words = ["npm", "install", "--no-audit", "--no-fund", *names]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"npm cannot install onnxruntime-web: {reason}")
    return folder / "node_modules"


class Server(http.server.ThreadingHTTPServer):
    """Counts the bytes that were sent of each path."""

    sent: Counter[str]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without printing anything, and counts the bytes that it sends."""

    def log_message(self, *_):
        pass

    server: Server

    def copyfile(self, source, outputfile):
        content = source.read()
        self.server.sent[self.path] += len(content)
        outputfile.write(content)


@pytest.fixture(scope="module")
def served(tmp_path_factory, packages):
    """Writes the page of a bundle and serves it; returns its address, its folder and the server."""
    servers = []

    def serve(bundle):
        folder = tmp_path_factory.mktemp("site") / "page"
        runtime = packages / site.LIBRARY
        site.write_page(Bundle.open(bundle), folder, runtime, replace=False)
        handler = functools.partial(Handler, directory=folder)
        server = Server(("127.0.0.1", 0), handler)
        server.sent = Counter()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://localhost:{server.server_port}/", folder, server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def visit(chromium):
    """Opens an address and waits for the first tokens or an error.

    At the end, nothing may have gone wrong, and the page may have asked no other address for
    anything.
    """
    contexts, wrong = [], []

    def go(address, **how):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **how})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("request", lambda one: wrong.extend([one.url][one.url.startswith(address) :]))
        page.goto(address)
        page.wait_for_selector(f"{READY}, #error:not([hidden])", state="attached")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not [line for line in wrong if not line.startswith(("blob:", "data:"))]


@pytest.fixture(scope="module")
def grey_site(bundle, served):
    return served(bundle)


@pytest.fixture(scope="module")
def grid_site(residual_bundle, served):
    return served(residual_bundle)


@pytest.fixture(scope="module")
def prior_bundle(model, tmp_path_factory):
    """The bundle of a model with four latents, 16 codes and a transformer as their prior."""
    spec = transformer(4, 16, width=16, depth=2, heads=2)
    learned = Prior(spec, prior_params(spec), model.digest(), {}, {"held_out": 9.5})
    folder = tmp_path_factory.mktemp("prior") / "model-onnx"
    options = GraphOptions(batch=3, index_type="int32")
    export(dataclasses.replace(model, prior=learned), folder, options=options)
    return folder


@pytest.fixture(scope="module")
def prior_site(prior_bundle, served):
    return served(prior_bundle)


def tokens_of(page):
    """Returns the codes that the map shows."""
    return page.eval_on_selector_all(".cells button", "all => all.map(x => Number(x.dataset.code))")


def pixels_of(page, canvas="#picture"):
    """Returns what a canvas shows, (H, W, 4) uint8."""
    shape, levels = page.eval_on_selector(
        canvas,
        "c => [[c.height, c.width, 4], "
        "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]",
    )
    return np.array(levels, np.uint8).reshape(shape)


def give(page, name, content):
    """Opens a file in the page; returns what the page says about it."""
    page.set_input_files("#file", {"name": name, "mimeType": "image/*", "buffer": content})
    said = page.locator("#status", has_text=re.compile(f"^{re.escape(name)}, "))
    page.locator("#error:not([hidden])").or_(said).wait_for()
    return page.inner_text("#error" if page.is_visible("#error") else "#status")


def png(image):
    """Returns a picture of an image (C, H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["grey", "grid"])
def test_tokens_of_a_hundred_pictures_are_the_codecs(
    request, visit, many_images, colour_images, kind
):
    bundle = request.getfixturevalue("bundle" if kind == "grey" else "residual_bundle")
    address, _, server = request.getfixturevalue(f"{kind}_site")
    images = many_images[:100, None] if kind == "grey" else colour_images[:100]
    server.sent.clear()
    page = visit(address)
    bytes_loaded = float(page.get_attribute("body", "data-bytes"))
    sent = sum(server.sent.values()) - server.sent["/icon.svg"]
    print(f"{kind}: {sent} bytes, {page.inner_text('#loaded')}")
    assert bytes_loaded == pytest.approx(sent, rel=0.001)
    expected = Codec.load(bundle, "cpu").encode(images)
    assert len(np.unique(expected)) > 8
    for i, image in enumerate(images):
        assert "exactly" in give(page, f"{i}.png", png(image))
        assert tokens_of(page) == expected[i].tolist(), i


@pytest.mark.parametrize("name", ["grey_site", "grid_site", "prior_site"])
def test_the_golden_batch_has_no_violation_in_a_browser(request, visit, name):
    page = visit(request.getfixturevalue(name)[0])
    page.click("#verify")
    page.wait_for_selector("#verify:not([disabled])")
    assert page.inner_text("#verdict").startswith("Verified: ")
    assert "Every graph has the digest" in page.inner_text("#verdict")
    rows = [line.split("\t") for line in page.inner_text("#report table").splitlines()[1:]]
    stages = ["encoder", "quantizer", "quantized", "tokenizer", "decoder", "reconstructions"]
    stages += ["detokenizer", *(["prior_step"] if name == "prior_site" else [])]
    assert [row[0] for row in rows] == stages
    assert all(int(row[1]) > 0 and row[-1] == "0" for row in rows)


FORGED = {
    "latents": ("encoder", lambda a: a.__setitem__((3, 0, 0), a[3, 0, 0] + 0.01)),
    "outputs": ("decoder", lambda a: a.__setitem__((0, 0, 5, 5), a[0, 0, 5, 5] - 0.01)),
    "reconstructions": ("detokenizer", lambda a: a.__setitem__((2, 0, 1, 1), np.nan)),
    "codebook": ("quantized", lambda a: a.__setitem__((..., 2), np.nextafter(a[:, 2], np.inf))),
}


@pytest.mark.parametrize("name", FORGED)
def test_wrong_values_are_found_in_a_browser(visit, served, bundle, name):
    address, folder, _ = served(bundle)
    stage, change = FORGED[name]
    array = np.load(folder / f"data/{name}.npy")
    change(array)
    np.save(folder / f"data/{name}.npy", array)
    assert stage in wrong_stages(visit(address))


def test_a_single_wrong_token_is_found_in_a_browser(visit, served, bundle):
    address, folder, _ = served(bundle)
    checks = json.loads((folder / "data/checks.json").read_text())
    tokenizer = next(check for check in checks if check["name"] == "tokenizer")
    at = next(i for i in range(9, 99) if str(i) not in tokenizer["ties"])
    tokenizer["expected"][at] = (tokenizer["expected"][at] + 1) % 16
    (folder / "data/checks.json").write_text(json.dumps(checks))
    assert wrong_stages(visit(address)) == {"tokenizer": "1"}


def wrong_stages(page):
    """Verifies; returns the stages at which something was wrong, and how much."""
    page.click("#verify")
    page.wait_for_selector("#verify:not([disabled])")
    assert page.inner_text("#verdict").startswith("Wrong: ")
    rows = [row.split("\t") for row in page.locator("tr.wrong").all_inner_texts()]
    return {row[0]: row[-1] for row in rows}


def test_a_damaged_graph_is_refused_in_a_browser(visit, served, bundle):
    address, folder, _ = served(bundle)
    content = bytearray((folder / "model/tokenizer.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model/tokenizer.onnx").write_bytes(content)
    assert visit(address).inner_text("#error") == "tokenizer.onnx: damaged"


def test_what_is_drawn_becomes_the_codecs_tokens(visit, grid_site, residual_bundle):
    page = visit(grid_site[0])
    before = tokens_of(page)
    page.click("#clear")
    box = page.locator("#picture").bounding_box()
    place = [box["x"] + 0.2 * box["width"], box["y"] + 0.3 * box["height"]]
    page.mouse.move(*place)
    page.mouse.down()
    page.mouse.move(place[0] + 0.5 * box["width"], place[1] + 0.4 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_timeout(1000)
    drawn = pixels_of(page)[..., :3]
    assert len(np.unique(drawn)) > 3
    expected = Codec.load(residual_bundle, "cpu").encode(drawn[None])[0].tolist()
    assert tokens_of(page) == expected != before


def test_everything_is_done_with_the_keyboard(visit, grid_site, residual_bundle):
    page = visit(grid_site[0])
    codec = Codec.load(residual_bundle, "cpu")
    page.focus("#picture")
    blank = pixels_of(page)
    for key in (" ", *["ArrowRight"] * 4, *["ArrowDown"] * 3, " "):
        page.keyboard.press(key)
    page.wait_for_timeout(1000)
    drawn = pixels_of(page)
    assert 4 < (drawn != blank).any(axis=2).sum() < 120
    own = codec.encode(drawn[None, ..., :3])[0].tolist()
    assert tokens_of(page) == own

    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.cells button')"):
            break
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.inner_text("#token-title").startswith("Token at row 3, column 2: code")
    page.wait_for_selector("#near button")
    assert page.locator("#near button").count() == 8
    page.focus("#code")
    page.keyboard.press("Control+a")
    swapped = [*own]
    swapped[2 * 4 + 1] = (own[2 * 4 + 1] + 7) % 32
    page.keyboard.type(str(swapped[2 * 4 + 1]))
    page.keyboard.press("Enter")
    page.wait_for_timeout(1000)
    assert tokens_of(page) == swapped
    expected = codec.decode([swapped], uint8=True)[0].transpose(1, 2, 0).astype(int)
    shown = pixels_of(page, "#reconstruction")[..., :3]
    assert np.abs(shown - expected).max() <= 1
    page.focus("#undo")
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    assert tokens_of(page) == own


def test_samples_of_a_seed_are_the_codecs_in_a_browser(visit, prior_site, prior_bundle):
    page = visit(prior_site[0])
    page.fill("#seed", "12345678901234567890")
    page.fill("#temperature", "0.7")
    page.click("#sampling button")
    page.wait_for_selector("#samples button")
    found = page.eval_on_selector_all("#samples button", "all => all.map(x => x.dataset.tokens)")
    codec = Codec.load(prior_bundle, "cpu")
    drawn = codec.draw(8, seed=12345678901234567890, temperature=0.7)
    sure = drawn.certified.all(axis=1)
    assert sure.sum() >= 6
    rows = np.array([[int(token) for token in row.split(",")] for row in found])
    np.testing.assert_array_equal(rows[sure], drawn.indices[sure])
    told = page.locator("#samples button").all_inner_texts()
    assert ["certified" in text for text in told] == sure.tolist()
    page.click("#samples button >> nth=2")
    page.wait_for_timeout(1000)
    assert tokens_of(page) == rows[2].tolist()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_finding_of_accessibility(visit, barriers, grid_site, scheme):
    page = visit(grid_site[0], color_scheme=scheme, bypass_csp=True)
    page.click("#sampling button")
    page.wait_for_selector("#samples button")
    page.click(".cells button")
    page.wait_for_selector("#near button")
    page.click("#near button")
    page.click("#verify")
    page.wait_for_selector("#verify:not([disabled])")
    page.click("summary")
    assert barriers(page) == []


@pytest.mark.parametrize("name", ["grey_site", "grid_site"])
def test_a_phone_shows_all_without_scrolling_aside(request, visit, name):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    page = visit(request.getfixturevalue(name)[0], **phone)
    page.tap(".cells button")
    page.wait_for_selector("#near button")
    page.click("#verify")
    page.wait_for_selector("#verify:not([disabled])")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    cell = page.locator(".cells button").first.bounding_box()
    assert min(cell["width"], cell["height"]) >= 24  # large enough for a finger


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_that_are_said_to_be_exact_are_the_packages_to_the_last_bit(
    visit, served, tmp_path, tmp_path_factory, channels
):
    spec = families.residual((channels, 16, 24), **RESIDUAL, variance=0.08)
    prepared = Preprocessing(channels, (16, 24), crop=True, background=(240, 10, 90))
    model = dataclasses.replace(small_model(spec), preprocessing=prepared)
    bundle = tmp_path_factory.mktemp("pictures") / "model-onnx"
    export(model, bundle)
    page, codec = visit(served(bundle)[0]), Codec.load(bundle, "cpu")
    exact, near, unread = 0, [], []
    for one in mixed_pictures.make(tmp_path, len(mixed_pictures.MAKERS), 1):
        path = tmp_path / one.name
        said = give(page, path.name, path.read_bytes())
        if path.name not in said:
            unread.append(path.name)
            continue
        expected = codec.prepare(path)[0].transpose(1, 2, 0)
        found = pixels_of(page)[..., :channels]
        off = np.abs(found.astype(int) - expected).max()
        if "exactly" in said:
            np.testing.assert_array_equal(found, expected, path.name)
            assert tokens_of(page) == codec.encode(path)[0].tolist(), path.name
            exact += 1
        else:
            near.append((path.name, int(off)))
    print(f"{exact} exact, off by at most {near}, not read {unread}")
    assert exact >= 8


def test_pictures_of_another_size_are_refused_in_a_browser(visit, served, bundle):
    page = visit(served(bundle)[0])
    before = tokens_of(page)
    line = give(page, "wide.png", png(np.zeros((1, 28, 29), np.uint8)))
    assert line == "29x28 pixels, and the model was trained on 28x28"
    assert "nonsense" not in give(page, "nothing.png", b"nonsense")
    assert tokens_of(page) == before


def test_the_page_allows_no_foreign_address():
    text = (site.SOURCE / "index.html").read_text()
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    for path in site.SOURCE.iterdir():
        addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", path.read_text()))
        assert addresses <= {"http://www.w3.org"}, path.name  # of SVG, only a name


@pytest.mark.parametrize("kind", ["post", "grid", "fp16"])
def test_the_codes_that_a_browser_may_answer_are_those_that_the_judge_allows(
    model, residual_model, tmp_path, kind
):
    made = residual_model if kind == "grid" else model
    options = GraphOptions(precision="fp16" if kind == "fp16" else "fp32")
    export(made, tmp_path / "bundle", options=options)
    bundle = Bundle.open(tmp_path / "bundle")
    oracle, spec = bundle.oracle(), bundle.spec
    latents, codebook = oracle.golden["latents"], oracle.params[CODEBOOK]
    checks = golden_checks(spec, oracle, bundle.precision, folded=bundle.folded)
    fed = next(check for check in checks if check["name"] == "quantizer")
    for code in range(spec.num_codes):
        answered = np.full(latents.shape[:2], code)
        judged = check_indices(answered, latents.astype(np.float32), codebook, precision="float32")
        fits = [
            code in fed["ties"].get(str(i), [expected])
            for i, expected in enumerate(fed["expected"])
        ]
        assert judged.compared - judged.violations == sum(fits)
    tokenizer = next(check for check in checks if check["name"] == "tokenizer")
    assert len(tokenizer["ties"]) >= len(fed["ties"])
    assert (len(tokenizer["ties"]) > 0) or kind != "fp16"


@pytest.fixture
def runtime(tmp_path):
    """A folder with the names of onnxruntime-web's files."""
    folder = tmp_path / "web/dist"
    folder.mkdir(parents=True)
    for name in site.RUNTIME.values():
        (folder / name).write_text(name)
    return folder.parent


def test_a_page_is_written_whole_and_replaced_only_where_one_is(run, refused, bundle, runtime):
    page = ("-m", "vqdeploy", "page", bundle, "--runtime", runtime)
    done = run(*page, "--output", "p", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    folder = runtime.parent / "p"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"index.html", "runtime/ort.wasm", "model/manifest.json", "data/checks.json"} < names
    for name in ("manifest.json", "tokenizer.onnx", "encoder.onnx"):
        assert (folder / "model" / name).read_bytes() == (bundle / name).read_bytes()
    linked = set(re.findall(r'(?:src|href)="([^"]*)"', (folder / "index.html").read_text()))
    for path in site.SOURCE.glob("*.js"):
        linked |= set(re.findall(r'(?:from "|URL\(")\./([^"]*)"', path.read_text()))
    assert linked <= names
    source = {path.name for path in site.SOURCE.iterdir()}
    assert source - names == {"package.json"}
    again = (*page, "--output", "p")
    assert "exists already" in refused(3, *again, PYTHONPATH=str(ROOT))
    assert run(*again, "--replace", PYTHONPATH=str(ROOT)).returncode == 0
    (folder / "data/page.json").unlink()
    assert "it is not a page" in refused(3, *again, "--replace", PYTHONPATH=str(ROOT))


def test_a_folder_without_the_runtime_is_bad_input(refused, bundle, tmp_path):
    command = ("-m", "vqdeploy", "page", bundle, "--runtime", tmp_path)
    assert "ort.wasm.bundle.min.mjs" in refused(3, *command, PYTHONPATH=str(ROOT))


@pytest.mark.parametrize("npm", ["missing", "failing"])
def test_what_npm_cannot_fetch_is_one_line_that_says_what_to_do(refused, bundle, tmp_path, npm):
    (tmp_path / "bin").mkdir()
    if npm == "failing":
        program = tmp_path / "bin/npm"
        program.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
        program.chmod(0o755)
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}/bin:/bin"}
    if npm == "missing":
        environment["PATH"] = str(tmp_path / "bin")
    line = refused(5, "-m", "vqdeploy", "page", bundle, **environment)
    assert "--runtime" in line
    assert ("ENOTFOUND" if npm == "failing" else "not installed") in line

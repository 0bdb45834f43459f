"""Checks a bundle against the oracle it carries, on any provider, with numpy and onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqdeploy.agreement import check_graphs
from vqdeploy.bundle import CARD, MANIFEST, Bundle
from vqdeploy.graphs.build import GRAPHS_VERSION, GraphOptions
from vqdeploy.proof.advance import (
    EXPLAINED,
    check_proved,
    explained_encoder,
    provable,
)
from vqdeploy.proof.golden import Answered, check_recorded, require_golden
from vqdeploy.proof.measure import check_kept
from vqdeploy.proof.prior import MANY, SAMPLED, check_prior
from vqdeploy.proof.samples import aimed_images, check_codes, check_composed, check_samples
from vqdeploy.proof.structure import check_structure
from vqdeploy.proof.table import check_table
from vqdeploy.runtime.protobuf import Graph, read_graph
from vqdeploy.runtime.sessions import Runtime, Session, open_sessions
from vqdeploy.stages import PRIOR_STAGES, STAGES
from vqref.agreement.advance import CLAIM, Proof, count_proved, prove
from vqref.agreement.report import Check, Report
from vqref.errors import InputError
from vqref.precisions import PRECISIONS, of_option
from vqref.spec import ModelSpec
from vqref.validation import Array, Params

Placement = dict[str, dict[str, dict[str, int]]]
"""The nodes per operator that each provider runs: {stage: {provider: {operator: count}}}."""


class Verified(NamedTuple):
    """What a verification found, the device that ran it, and where each graph's nodes were placed.

    proved: how many tokens of the given images are proved in advance, or of the golden batch if
    there are none. It holds the entries of ``count_proved``, and ``of``, which names the images.
    None for networks with fewer bits than float32, and if the oracle is too slow on the networks.
    """

    report: Report
    device: str
    placement: Placement
    proved: dict[str, Any] | None


@dataclass(frozen=True)
class Written:
    """The graphs of a bundle, as they are written and as they run.

    options: how they were written. ``fold`` says whether the detokenizer is a table.
    """

    graphs: Mapping[str, Graph]
    sessions: Mapping[str, Session]
    options: GraphOptions


def verify(
    bundle: str | Path | Bundle,
    device: str = "auto",
    images: Array | None = None,
    samples: int = 0,
    threads: int | None = None,
) -> Verified:
    """Checks a bundle and returns what it found.

    It checks the digest of every file, the recorded answers, the nodes and weights of the graphs,
    and their answers on ``device``. Graphs whose nodes differ from what the rows say are not run.

    bundle: its folder, or an open Bundle. device: "cpu", "cuda" or "auto".
    images: more images (N, C, H, W), float32 in [0, 1], to compare besides the golden batch and
    the images that are aimed at every code.
    samples: how many latents to feed the quantizer, see ``vqdeploy.proof.samples``. If it is not 0,
    more samples of a prior are drawn too.
    threads: threads per operator. None leaves the choice to onnxruntime.

    Raises InputError for a damaged bundle, MachineError if the device cannot be used.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    spec, oracle, options = bundle.spec, bundle.oracle(), _options(bundle)
    bundle.read(CARD)
    stages = (*STAGES, *(PRIOR_STAGES if bundle.prior else ()))
    graphs = {stage: read_graph(f"{stage}.onnx", bundle.graph(stage)) for stage in stages}
    learned = None if bundle.prior is None else (bundle.prior, oracle.prior)
    golden = oracle.golden["images"]
    try:
        require_golden(spec, golden)
        own = np.concatenate([golden, aimed_images(spec, oracle.params)])
        asked = Answered.of(
            spec, oracle.params, own if images is None else np.concatenate([own, images])
        )
        recorded = check_recorded(spec, oracle, asked.known)
        structure = check_structure(spec, oracle.params, graphs, options, learned)
    except ValueError as error:
        raise InputError(
            f"{bundle.path}: the oracle file does not fit the manifest: {error}"
        ) from None
    tokens = [asked.known.indices]
    checks, placement, chosen = list[Check](), Placement(), "nothing: the graphs were not run"
    advance = _in_advance(bundle, oracle.params, asked.images, len(own), len(golden))
    if structure[0].passed:
        runtime = Runtime(intra_op_num_threads=threads)
        own_graphs = {stage: graphs[stage] for stage in STAGES}
        sessions, chosen = open_sessions(
            own_graphs, spec, device, batch=bundle.batch, runtime=runtime
        )
        written, kept = Written(graphs, sessions, options), bundle.manifest["kept"]
        checks += check_answers(spec, oracle.params, asked, written, len(own), kept)
        few = asked.images[:EXPLAINED]
        checks = [
            explained_encoder(check, spec, oracle.params, few, sessions["encoder"])
            for check in checks
        ]
        if advance is not None:
            checks.append(advance.check(spec, oracle.params, asked.images, sessions["tokenizer"]))
        composed, found = check_composed(spec, oracle.params, sessions, bundle.precision)
        checks.append(composed)
        tokens.append(found)
        if learned is not None:
            both = {stage: graphs[stage] for stage in PRIOR_STAGES}
            opened, _ = open_sessions(both, learned[0], chosen, batch=bundle.batch, runtime=runtime)
            sampled = MANY if samples else SAMPLED
            checks += check_prior(*learned, oracle.golden_prior, opened, sampled)
            sessions |= opened
        if samples:
            checks += check_samples(spec, oracle.params, sessions, samples)
        placement = {stage: session.placement() for stage, session in sessions.items()}
    codes = len(np.unique(np.concatenate(tokens)))
    report = Report((*recorded.checks, *checks, *structure), len(asked.images), codes)
    return Verified(report, chosen, placement, None if advance is None else advance.counts)


@dataclass(frozen=True)
class _Advance:
    """Proofs of some of the images for CLAIM.

    places: the numbers of these images among the compared ones. counts: the value of
    ``Verified.proved``.
    """

    places: npt.NDArray[np.int64]
    proof: Proof
    counts: dict[str, Any]

    def check(self, spec: ModelSpec, params: Params, images: Array, tokenizer: Session) -> Check:
        chosen = images[self.places]
        tokens = tokenizer(chosen)[0]
        return check_proved(spec, params, chosen, tokens, self.proof, places=self.places)


def _in_advance(
    bundle: Bundle, params: Params, images: Array, own: int, golden: int
) -> _Advance | None:
    """Proves as many images as a verification has time for. None if there is nothing to prove.

    Takes the given images first, then the golden batch, then the aimed images.
    """
    spec, given = bundle.spec, len(images) - own
    count = provable(spec, own, given)
    if bundle.precision != CLAIM or not count:
        return None
    places = np.concatenate([np.arange(own, len(images)), np.arange(own)])[:count]
    proof = prove(spec, params, images[places], CLAIM, closely=False)
    told = min(count, given or golden)
    counts = count_proved(spec, params, images[places[:told]], proof.proved[:told])
    of = "the given images" if given else "the golden batch"
    return _Advance(places, proof, {**counts, "of": of})


def _options(bundle: Bundle) -> GraphOptions:
    """Returns how the graphs were written. Raises InputError if this version writes others."""
    said = bundle.manifest
    if said["graphs_version"] != GRAPHS_VERSION:
        exporter = said["provenance"].get("export")
        raise InputError(
            f"{bundle.path}: its graphs are of version {said['graphs_version']}, but this program "
            f"writes version {GRAPHS_VERSION}; verify it with what exported it, {exporter}, or "
            "export its model.pt again"
        )
    option = PRECISIONS[bundle.precision].option
    try:
        form = bundle.batch, bundle.folded, said["target"], bundle.index_type
        options = GraphOptions(said["opset"], option, *form)
        options.folds(bundle.spec)
        return options
    except ValueError as error:
        raise InputError(f"{bundle.path / MANIFEST}: damaged: {error}") from None


def check_answers(
    spec: ModelSpec,
    params: Params,
    asked: Answered,
    written: Written,
    own: int,
    kept: Mapping[str, int] | None = None,
) -> Iterator[Check]:
    """Checks the answers of a bundle's graphs, before it is published and when it is verified.

    asked: images and the oracle's answers. own: networks with fewer bits than float32 must keep
    most tokens of the first ``own`` images. kept: how many tokens they kept at export, None during
    the export.
    """
    graphs, sessions, options = written.graphs, written.sessions, written.options
    precision, folded = of_option(options.precision), bool(options.fold)
    yield from check_graphs(
        spec,
        params,
        asked.images,
        sessions,
        precision=precision,
        folded=folded,
        known=asked.known,
    ).checks
    yield check_codes(spec, params, sessions)
    table = graphs["detokenizer"].tensors.get("table")
    if folded and table is not None:
        yield check_table(spec, params, table.array(), sessions, precision)
    if precision != "float32":  # float32 tokens are certified one by one
        found, exact = sessions["tokenizer"](asked.images[:own])[0], asked.known.indices[:own]
        yield check_kept(precision, found, exact, kept)

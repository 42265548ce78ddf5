"""A mixture -> an ONNX export of its base, with the base's weights replaced by the folded ones and nothing else touched.

No tracing, no model: a fold changes no size, so the new file is the old one with some byte ranges rewritten. Which ranges,
`onnx_match` says; a weight that it cannot tell is refused by name. Files are streamed by the dense writer; in memory are a
few weights at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..errors import BaseModelError, UnsupportedError, VerifyError, WloraMergeError
from ..io.hub import is_here
from ..io.safetensors_file import Entry, torch_dtype
from ..mixture.mixture import Mixture
from ..models.base_model import BaseModel
from ..models.names import NameResolver
from ..onnx.graph import MODEL, graph_file
from ..onnx.match import Matcher, Tile, as_matrix, read_into
from ..onnx.protobuf import OnnxFile, read_onnx
from ..onnx.seq2seq import DECODER, ENCODER
from ..progress import LOG
from .dense import OutputFile, Piece
from .stream import fold_into, write_files

PAIR = (graph_file(ENCODER), graph_file(DECODER))
MODEL_FILE = graph_file(MODEL)  # what the graph of a single file is called, whatever that file was
TRACE_INSTEAD = "leave --onnx-base out to trace the mixture anew"


@dataclass
class Refold:
    """What will be written: the files, and in each graph the weights that change."""

    graphs: list[OnnxFile]
    files: list[OutputFile]
    weights: dict[tuple[Path, int], tuple[Entry, list[Tile]]]
    names: dict[Path, str] = field(default_factory=dict)

    @property
    def dtypes(self) -> set[str]:
        """safetensors names of the dtypes of the weights that change."""
        return {e.dtype for graph in self.graphs for e in graph.tensors if (e.file, e.start) in self.weights}


def find_graphs(onnx_base: Path) -> list[Path]:
    """The graphs of an export: the file itself, or those of a folder's `onnx`, or of the folder.

    Raises:
        BaseModelError: there is none.
    """
    if is_here(onnx_base) and onnx_base.is_file():
        return [onnx_base]
    for folder in (onnx_base / "onnx", onnx_base) if is_here(onnx_base) else ():
        if found := sorted(folder.glob("*.onnx")):
            return found
    raise BaseModelError(f"{onnx_base}: no ONNX file there; say --onnx-base FILE.onnx, or a folder that holds one.")


def plan_refold(onnx_base: Path, base: BaseModel, pieces: Iterable[Piece], mixture: Mixture) -> Refold:
    """Find every changed tensor in the graphs, and lay out the files, before a byte is written.

    Args:
        onnx_base: an ONNX file exported from `base`, or a folder of such files.
        base: the opened base.
        pieces: the tensors of the mixture's dense export; those that are not the base's own bytes are looked for.
        mixture: whose weights the folds take.

    Raises:
        BaseModelError: the graph has a weight that is not this base's, or lacks one; the first is named.
        UnsupportedError: it is quantized, or holds a tensor that cannot be told from another or be replaced.
    """
    graphs = _float_graphs(onnx_base)
    changed = {piece.name: piece for piece in pieces if not piece.untouched}
    if new := [name for name in changed if name not in base.entries]:
        raise UnsupportedError(
            f"{onnx_base}: the mixture brings a tensor {new[0]!r} that the base lacks, so no weight of the graph can be known for "
            f"it: {TRACE_INSTEAD}."
        )
    matcher = Matcher(base)
    refold = Refold(graphs, [], {}, _names_of(graphs, onnx_base))
    places: set[str] = set()
    for graph in graphs:
        known, unknown = matcher.match(graph, set(changed))
        _refuse_strange(graph, unknown, matcher)
        places |= _place_weights(graph, known, set(changed), refold.weights)
    if lost := [name for name in changed if name not in places]:
        raise BaseModelError(_missing(onnx_base, lost[0], base.entries[lost[0]], graphs))
    written = set[Path]()
    for graph in graphs:
        paths = [path for path in (graph.path, *graph.data) if path not in written]  # several may share their data
        written.update(paths)
        refold.files += _files_of(graph, paths, refold, matcher, changed, mixture)
    return refold


def _float_graphs(onnx_base: Path) -> list[OnnxFile]:
    """The graphs of an export; a quantized one is left out where there is a float one.

    Raises:
        UnsupportedError: all are quantized.
    """
    found = [read_onnx(path) for path in find_graphs(onnx_base)]
    graphs = [graph for graph in found if not graph.quantized]
    if not graphs:
        name, operator = next(iter(found[0].quantized.items()))
        raise UnsupportedError(
            f"{found[0].path}: its weight {name!r} is quantized ({operator}), and a fold into it would not be exact: give an export "
            "in float32 or float16, and quantize after the fold."
        )
    if left := [graph.path.name for graph in found if graph.quantized]:
        LOG.info(f"{onnx_base}: {', '.join(left)} is quantized and left out: quantize the new graph again.")
    return graphs


def _names_of(graphs: Sequence[OnnxFile], onnx_base: Path) -> dict[Path, str]:
    """What the graphs will be called.

    Raises:
        UnsupportedError: several, among which there is no model that the libraries would look for.
    """
    if len(graphs) == 1:
        return {graphs[0].path: MODEL_FILE}
    names = {graph.path: graph.path.name for graph in graphs}
    if MODEL_FILE not in names.values() and not {*PAIR} <= {*names.values()}:
        raise UnsupportedError(
            f"{onnx_base}: holds {', '.join(sorted(names.values()))}, expected {MODEL_FILE}, or {' and '.join(PAIR)}: name one file."
        )
    return names


def _place_weights(
    graph: OnnxFile,
    found: Iterable[tuple[Entry, list[Tile]]],
    changed: set[str],
    weights: dict[tuple[Path, int], tuple[Entry, list[Tile]]],
) -> set[str]:
    """Add the weights of a graph that change to `weights`, with their tiles; the changed tensors that are there, each once."""
    places: dict[str, str] = {}
    for stored, parts in found:
        for tile in parts:
            for name in sorted({tile.tensor, *tile.twins} & changed):
                if tile.twins:
                    other = sorted({tile.tensor, *tile.twins} - {name})[0]
                    raise UnsupportedError(
                        f"{graph.path}: its weight {stored.name!r} equals the base tensors {name!r} and {other!r} alike, so which "
                        f"of them it is cannot be told: {TRACE_INSTEAD}."
                    )
                if name in places:
                    raise UnsupportedError(
                        f"{graph.path}: the base tensor {name!r} is found more than once, as {places[name]!r} and as "
                        f"{stored.name!r}: {TRACE_INSTEAD}."
                    )
                places[name] = stored.name
                weights[stored.file, stored.start] = stored, parts
    return set(places)


def write_refold(refold: Refold, out: Path, mixture: Mixture) -> dict[str, str]:
    """Stream the files into the folder `out`, each weight at the place where the base's was.

    Returns:
        File name -> sha256, hashed as the bytes passed.

    Raises:
        BaseModelError: a weight of the graph is not the base's.
        OutputError: the disk is full or refuses.
        VerifyError: the new graph's weights do not lie where the base's do.
    """
    written = write_files(refold.files, out, mixture)
    for graph in refold.graphs:
        new = read_onnx(out / refold.names[graph.path])
        if [replace(e, file=out / refold.names.get(e.file, e.file.name)) for e in graph.tensors] != new.tensors:
            raise VerifyError(f"{new.path}: its weights do not lie where those of {graph.path} do: report this.")
    return written


def _refuse_strange(graph: OnnxFile, unknown: Sequence[Entry], matcher: Matcher) -> None:
    """Refuse a weight that is called like a base tensor, or has the shape of one, and is none."""
    entries = matcher.base.entries
    resolver = NameResolver(entries)
    for stored in unknown:
        if (known := _of_that_name(stored, resolver)) is not None and entries[known].shape == stored.shape:
            raise BaseModelError(_foreign(graph, matcher.difference(stored, Tile(known, 0, 0, False))))
        turned = (*stored.shape[:-2], *stored.shape[:-3:-1])
        stack = next((n for n, e in entries.items() if len(e.shape) == 3 and e.shape == turned), None)
        if stack is not None:
            raise UnsupportedError(
                f"{graph.path}: its weight {stored.name!r} {list(stored.shape)} may be the matrices of {stack!r}, each transposed, "
                f"which a refold does not follow: {TRACE_INSTEAD}."
            )
        if (like := _of_that_shape(stored, entries)) is not None:
            raise BaseModelError(
                _foreign(graph, f"weight {stored.name!r} has the shape of {like!r} and equals no tensor of the base")
            )


def _of_that_name(stored: Entry, resolver: NameResolver) -> str | None:
    """The base tensor that a weight is called like; None where the name fits none, or several."""
    try:
        return resolver.find(stored.name) or resolver.find(stored.name.partition(".")[2])
    except WloraMergeError:
        return None


def _of_that_shape(stored: Entry, entries: Mapping[str, Entry]) -> str | None:
    """The first base tensor of two dimensions or more that has a weight's shape, as it is or transposed."""
    if len(stored.shape) < 2:
        return None
    rows, cols = as_matrix(stored.shape)
    alike = ((rows, cols), (cols, rows))
    return next((n for n, e in entries.items() if len(e.shape) > 1 and as_matrix(e.shape) in alike), None)


def _foreign(graph: OnnxFile, difference: str | None) -> str:
    return (
        f"{graph.path}: its {difference}: it was exported from another model or revision; give an export of this base, or "
        f"{TRACE_INSTEAD}."
    )


def _missing(onnx_base: Path, name: str, entry: Entry, graphs: Sequence[OnnxFile]) -> str:
    dtypes = ", ".join(sorted({e.dtype for graph in graphs for e in graph.tensors})) or "it has none"
    return (
        f"{onnx_base}: the base tensor {name!r} {list(entry.shape)} is in none of its weights ({dtypes}), neither as it is nor "
        "transposed nor side by side with others: it was exported from another model or revision, or its exporter changed the "
        f"weight; {TRACE_INSTEAD}."
    )


# --------------------------------------------------------------------------------------------------- the rewriting


def _files_of(
    graph: OnnxFile,
    paths: Iterable[Path],
    refold: Refold,
    matcher: Matcher,
    changed: Mapping[str, Piece],
    mixture: Mixture,
) -> Iterator[OutputFile]:
    """Files of the graph: ranges that are copied, between weights that are made anew."""
    for path in paths:
        pieces, at = [], 0
        for key in sorted(key for key in refold.weights if key[0] == path):
            entry, tiles = refold.weights[key]
            pieces.append(_copied(path, at, entry.start))
            make = partial(_rewritten, graph, matcher, entry, tiles, changed, mixture)
            pieces.append(Piece(entry.name, entry.dtype, entry.shape, make=make))
            at = entry.end
        pieces.append(_copied(path, at, path.stat().st_size))
        yield OutputFile(refold.names.get(path, path.name), [piece for piece in pieces if piece.nbytes], {}, b"")


def _copied(path: Path, start: int, end: int) -> Piece:
    return Piece(path.name, "U8", (end - start,), Entry(path.name, path, "U8", (end - start,), start, end))


def _rewritten(
    graph: OnnxFile,
    matcher: Matcher,
    stored: Entry,
    tiles: Sequence[Tile],
    changed: Mapping[str, Piece],
    mixture: Mixture,
    take: Callable[[int], memoryview],
) -> memoryview:
    """A weight of the graph with its base tensors replaced by the folded ones, after each was found to be the base's."""
    import torch

    data = take(stored.nbytes)
    read_into(stored, data)
    matrix = torch.frombuffer(data, dtype=torch_dtype(stored.dtype)).view(as_matrix(stored.shape))
    for tile in tiles:
        if difference := matcher.difference(stored, tile, matrix):
            raise BaseModelError(_foreign(graph, difference))
        if tile.tensor in changed:
            piece = replace(changed[tile.tensor], dtype=stored.dtype)
            if piece.shape != matcher.base.entries[tile.tensor].shape:
                raise UnsupportedError(
                    f"{stored.file}: the mixture's {piece.name!r} is {list(piece.shape)}, the graph's "
                    f"{list(matcher.base.entries[tile.tensor].shape)}: another number of labels needs a new graph: {TRACE_INSTEAD}."
                )
            part = matcher.part(matrix, tile)
            fold_into(piece, mixture, matcher.space, part.T if tile.transposed else part)
    return data

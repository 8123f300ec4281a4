"""The emulator that CUDA kernels run on in tests: small kernels with answers worked out by hand, and broken ones.

Every test runs in several orders of execution and with both ways to switch between threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulation.build import CHECKS, ROOT, build, target

FULL = 0xFFFFFFFF
SEEDS = range(1, 9)


@dataclass(frozen=True)
class Emulator:
    library: ctypes.CDLL

    def __call__(
        self, kernel: str, words: Sequence[int], size: int, blocks: int = 1, threads: int = 32, shared: int = 0
    ) -> list[int]:
        """What the kernel leaves in ``size`` words that were 0.

        Raises:
            RuntimeError: with the emulator's message.
        """
        out = (ctypes.c_uint64 * size)()
        message = ctypes.create_string_buffer(500)
        failed = self.library.emulation_check(
            kernel.encode(), blocks, threads, shared, (ctypes.c_uint64 * len(words))(*words), len(words), out, size,
            message, len(message),
        )  # fmt: skip
        if failed:
            raise RuntimeError(message.value.decode())
        return list(out)


@functools.cache
def _emulator(name: str) -> Emulator:
    build(name)
    return Emulator(ctypes.CDLL(str(target(name))))


@pytest.fixture(params=["check_emulation", "check_ucontext"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """In the natural order."""
    monkeypatch.delenv("ADCERT_EMULATION_ORDER", raising=False)
    return _emulator(request.param)


@pytest.fixture(params=[0, 1, 2])
def any_order(run: Emulator, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    monkeypatch.setenv("ADCERT_EMULATION_ORDER", str(request.param))
    return run


def test_indices(any_order: Emulator) -> None:
    rows = [[thread, block, 5, 3, 40] for block in range(3) for thread in range(5)]
    assert any_order("indices", [], 75, blocks=3, threads=5) == [word for row in rows for word in row]


def test_grid_stride(any_order: Emulator) -> None:
    # 2 blocks of 3 threads: words 0 to 2 belong to block 0, 3 to 5 to block 1, 6 and 7 to block 0 again.
    assert any_order("grid_stride", [1, 2, 3, 4, 5, 6, 7, 8], 8, blocks=2, threads=3) == [
        100, 200, 300, 401, 501, 601, 700, 800,
    ]  # fmt: skip


def test_processors(run: Emulator) -> None:
    assert run.library.emulation_processors() == 3


@pytest.mark.parametrize(
    ("word", "counts"),
    [
        (0x0000000500000014, [2, 4, 27, 29, 3, 3, 0x28000000]),
        (0, [0, 0, 32, 64, 0, 0, 0]),
        (0x8000000080000000, [1, 2, 0, 0, 32, 32, 1]),
        (0x0000000100000000, [0, 1, 32, 31, 0, 33, 0]),
    ],
)
def test_bits(run: Emulator, word: int, counts: list[int]) -> None:
    rest = [word, 0x3F800000, 1, 3, 4, 0x3FF0000000000000, 5, 4, 2]
    assert run("bits", [word], 16, threads=1) == counts + rest


def test_vectors(run: Emulator) -> None:
    values = [*range(1, 12), 14, 15, 16, 17, 20]
    assert run("vectors", [], 23, threads=1) == [*values, 16, 8, 16, 8, 16, 8, 16]


def test_votes(any_order: Emulator) -> None:
    some = [int(lane in (0, 5, 31)) for lane in range(32)]
    out = any_order("votes", [*some, *[1] * 32, *[0] * 32], 3 * 96, threads=96)
    assert out == [0x80000021, 1, 0] * 32 + [FULL, 1, 1] * 32 + [0, 0, 0] * 32


def _shuffled(out: list[int], which: int) -> list[int]:
    return [word - 100 for word in out[which::4]]


@pytest.mark.parametrize(("kind", "scale"), [(0, 1), (1, 1), (2, 1), (3, 1 << 32), (4, 1), (5, 1)])
def test_shuffles(any_order: Emulator, kind: int, scale: int) -> None:
    out = [word // scale for word in any_order("shuffles", [kind, 3, 32], 128)]
    assert _shuffled(out, 0) == [3] * 32
    assert _shuffled(out, 1) == [0, 1, 2, *range(29)]
    assert _shuffled(out, 2) == [*range(3, 32), 29, 30, 31]
    assert _shuffled(out, 3) == [base + offset for base in range(0, 32, 4) for offset in (3, 2, 1, 0)]


def test_shuffles_in_groups(any_order: Emulator) -> None:
    out = any_order("shuffles", [1, 9, 8], 128)
    lanes = list(range(32))
    assert _shuffled(out, 0) == [1] * 8 + [9] * 8 + [17] * 8 + [25] * 8  # 9 mod 8
    assert _shuffled(out, 1) == _shuffled(out, 2) == lanes  # 9 lanes on is outside of every group
    # lane ^ 9 lies in the next group, which cannot be read, or in the one before, which can.
    assert _shuffled(out, 3) == [
        *lanes[:8], 1, 0, 3, 2, 5, 4, 7, 6, *lanes[16:24], 17, 16, 19, 18, 21, 20, 23, 22,
    ]  # fmt: skip
    out = any_order("shuffles", [1, 2, 4], 128)
    assert _shuffled(out, 1)[:8] == [0, 1, 0, 1, 4, 5, 4, 5]
    assert _shuffled(out, 2)[:8] == [2, 3, 2, 3, 6, 7, 6, 7]


def test_shuffle_from_outside(any_order: Emulator) -> None:
    assert any_order("outsider", [], 32) == [0xA5A5A5A5, 0] * 16


def test_reductions(any_order: Emulator) -> None:
    # 64 to 95: the sum is 32 * 64 + 496, bit 6 is set in all of them, every bit is set in an even number of them.
    expected = [2544, 64, 95, 95, 64, 0, 2544, 95, 64]
    assert any_order("reductions", range(64, 96), 9 * 32) == expected * 32


def test_matches(any_order: Emulator) -> None:
    masks = [0x49249249, 0x92492492, 0x24924924]  # bits 0, 3, 6 ... and so on
    expected = [masks[lane % 3] for lane in range(32) for _ in range(2)]
    assert any_order("matches", [lane % 3 for lane in range(32)], 64) == expected


def test_groups_of_a_warp(any_order: Emulator) -> None:
    odd = 0xAAAAAA00  # odd lanes from 8 on
    assert any_order("halves", [], 32) == [odd] * 8 + [28] * 8 + [odd] * 16


def test_exited_lanes(any_order: Emulator) -> None:
    below = [0, *range(0, 30, 2)]
    assert any_order("leavers", [], 32) == [
        word for lane in range(16) for word in (0x11111111 + (below[lane] << 32), 0)
    ]


@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (3, 64), (2, 1024)])
def test_append(any_order: Emulator, blocks: int, threads: int) -> None:
    words = [int(i % 3 == 0 or i % 7 == 0) for i in range(1000)]
    found = [i for i in range(1000) if words[i]]
    out = any_order("append", words, 1001, blocks=blocks, threads=threads)
    assert out[0] == len(found) == 429
    assert sorted(out[1 : 1 + len(found)]) == found


def test_block_sums(any_order: Emulator) -> None:
    out = any_order("block_sums", range(1000), 3, blocks=3, threads=64)
    assert out == [sum(i for i in range(1000) if i // 64 % 3 == block) for block in range(3)]
    assert sum(out) == 499500


def test_block_votes(any_order: Emulator) -> None:
    def votes(words: list[int]) -> list[int]:
        return any_order("block_votes", words, 3 * 70, threads=70)

    assert votes([0] * 69 + [2]) == [1, 0, 1] * 70
    assert votes([0] * 70) == [0, 0, 0] * 70
    assert votes([3] * 70) == [1, 1, 70] * 70


def test_dynamic_shared(any_order: Emulator) -> None:
    out = any_order("reverse", range(80), 80, blocks=2, threads=40, shared=320)
    assert out == [*range(39, -1, -1), *range(79, 39, -1)]


def test_atomics(any_order: Emulator) -> None:
    # 32 threads t; the sum of t is 496; 1 ^ 2 ^ ... ^ 32 = 32.
    assert any_order("atomics", [], 20) == [
        496, 31, 31, 64, 496, 7, 31, FULL, 1, 32, 496 << 33, 5, 31 << 33, 31 << 33, 31, 1, 16, 8, 96, 5,
    ]  # fmt: skip


def test_exchanges(run: Emulator) -> None:
    assert run("exchanges", [], 11, threads=1) == [3, 4, 5, 6, 7, 11, 8, 11, 8, 9, 10]


# ---- Order


def _outcomes(run: Emulator, monkeypatch: pytest.MonkeyPatch, *args: object, **launch: int) -> list[list[int]]:
    """In the natural order, then by seed."""
    outcomes = []
    for seed in [0, *SEEDS]:
        monkeypatch.setenv("ADCERT_EMULATION_ORDER", str(seed))
        outcomes.append(run(*args, **launch))  # type: ignore[arg-type]
        assert run(*args, **launch) == outcomes[-1]  # type: ignore[arg-type]
    return outcomes


@pytest.mark.parametrize(("blocks", "threads"), [(8, 32), (1, 256)])
def test_order_of_blocks_and_warps(run: Emulator, monkeypatch: pytest.MonkeyPatch, blocks: int, threads: int) -> None:
    natural, *hostile = _outcomes(run, monkeypatch, "append", [1] * 256, 257, blocks=blocks, threads=threads)
    assert natural == [256, *range(256)]
    assert len({tuple(out) for out in hostile}) > 4
    assert all(sorted(out[1:]) == list(range(256)) for out in hostile)


def test_the_first_warp(run: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    natural, *hostile = _outcomes(run, monkeypatch, "arrivals", [], 257, threads=256)
    assert natural == [256, *range(256)]
    assert len({out[1] // 32 for out in hostile}) > 2


@pytest.mark.parametrize(("kernel", "threads"), [("no_barrier", 32), ("warps_only", 64)])
def test_order_of_lanes_and_warps_that_run_ahead(
    run: Emulator, monkeypatch: pytest.MonkeyPatch, kernel: str, threads: int
) -> None:
    assert run(kernel, [1], threads, threads=threads) == [1] * threads
    wrong = 0
    for seed in SEEDS:
        monkeypatch.setenv("ADCERT_EMULATION_ORDER", str(seed))
        word = 1 + seed  # shared memory still holds the last launch's
        wrong += run(kernel, [word], threads, threads=threads) != [word] * threads
    assert wrong > 3


def test_a_thread_may_stop_before_an_atomic(run: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    natural, *hostile = _outcomes(run, monkeypatch, "lost_update", [], 2, threads=64)
    assert natural == [64, 64]
    assert all(counted == 64 for _, counted in hostile)
    assert all(updates < 64 for updates, _ in hostile)


def test_order_must_be_a_number(run: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADCERT_EMULATION_ORDER", "random")
    with pytest.raises(RuntimeError, match="ADCERT_EMULATION_ORDER must be an integer, got random"):
        run("votes", [0] * 32, 96)


# ---- Broken kernels

BUGS = [
    ("mask_without_caller", 32, [], "lane 31.*__ballot_sync with mask 0x7fffffff.*does not name the caller"),
    ("mask_of_nobody", 32, [0], "__ballot_sync: the mask is 0"),
    ("mask_names_exited", 32, [3], "(thread 3 .*exits, while .* waits for it in|: lane 3 exited before)"),
    ("mask_names_missing", 40, [], r"\(warp 1, lane .*__any_sync.*the warp has only 8 lanes"),
    (
        "different_masks",
        32,
        [],
        "__ballot_sync with mask 0x(.)fffffff.*waits in __ballot_sync with mask 0x(?!\\1)[7f]f",
    ),
    ("different_collectives", 32, [], "(__any_sync.*waits in __all_sync|__all_sync.*waits in __any_sync)"),
    ("different_lines", 32, [], r"__any_sync.*check_bugs.cuh:\d+\): lane \d+ waits in __any_sync.*check_bugs.cuh:\d+"),
    ("uneven_loop", 32, [], "(exits, while .* waits for it in __any_sync|__any_sync.*: lanes? [0-9, ]+ exited before)"),
    ("vote_against_barrier", 32, [5], "(__any_sync.*waits in __syncthreads|__syncthreads.*waits in __any_sync)"),
    ("barrier_missed", 96, [1], r"(exits, while .*waits for it in __syncthreads|__syncthreads.*threads exited before)"),
    ("different_barriers", 64, [], "__syncthreads.*waits in __syncthreads"),
    ("barriers_on_different_lines", 64, [], r"__syncthreads \(check_bugs.cuh:\d+\): .* waits in __syncthreads"),
    ("ring", 32, [], "deadlock: block 0, thread 0 .*__any_sync with mask 0x00000003.* for lane 1$"),
    ("ring_and_barrier", 64, [], "deadlock: .* waits in __syncthreads .* for the other threads of the block"),
    ("active_mask", 32, [], "__activemask says nothing reliable"),
    ("wide_shuffle", 32, [3], "__shfl_sync: the width must be a power of two up to 32, got 3"),
    ("wide_shuffle", 32, [64], "got 64"),
    ("far_shuffle", 32, [32], "__shfl_down_sync: lanes differ by less than 32, got 32"),
    ("misaligned", 32, [], "an atomic on a misaligned address"),
    ("nested_launch", 32, [], "a kernel cannot launch another"),
    ("own_exception", 32, [7], "^the kernel's own$"),
]


@pytest.mark.parametrize(("kernel", "threads", "words", "message"), BUGS)
def test_broken_kernels(any_order: Emulator, kernel: str, threads: int, words: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        any_order(kernel, words, threads, threads=threads)
    if kernel != "own_exception":
        assert "emulation: " in str(caught.value)
        assert "block 0, thread " in str(caught.value)
    # The next kernel starts afresh.
    assert any_order("votes", [1] * 64, 192, threads=64) == [FULL, 1, 1] * 64


ONE_PLACE = [
    (
        "mask_names_exited",
        32,
        [0],
        "thread 1 (warp 0, lane 1): __any_sync with mask 0xffffffff (AT): lane 0 exited before",
    ),
    (
        "mask_names_exited",
        32,
        [31],
        "thread 31 (warp 0, lane 31): exits, while block 0, thread 0 (warp 0, lane 0) waits for it "
        "in __any_sync with mask 0xffffffff (AT)",
    ),
    (
        "vote_against_barrier",
        32,
        [0],
        "thread 1 (warp 0, lane 1): __any_sync with mask 0xffffffff (AT): lane 0 waits in __syncthreads (AT)",
    ),
    (
        "vote_against_barrier",
        32,
        [31],
        "thread 31 (warp 0, lane 31): __syncthreads (AT): lane 0 waits in __any_sync with mask 0xffffffff (AT)",
    ),
    ("barrier_missed", 96, [0], "thread 32 (warp 1, lane 0): __syncthreads (AT): 32 threads exited before"),
    (
        "barrier_missed",
        96,
        [2],
        "thread 64 (warp 2, lane 0): exits, while block 0, thread 0 (warp 0, lane 0) waits for it in "
        "__syncthreads (AT)",
    ),
]


@pytest.mark.parametrize(("kernel", "threads", "words", "message"), ONE_PLACE)
def test_where_it_is_noticed(run: Emulator, kernel: str, threads: int, words: list[int], message: str) -> None:
    """In the natural order: as soon as nothing can save the kernel."""
    with pytest.raises(RuntimeError) as caught:
        run(kernel, words, threads, threads=threads)
    assert re.sub(r"check_bugs\.cuh:\d+", "AT", str(caught.value)) == f"emulation: block 0, {message}"


def test_fibers_after_an_error(any_order: Emulator) -> None:
    def launches() -> list[int]:  # on a new host thread, with new fibers
        any_order("votes", [1] * 64, 192, threads=64)
        with pytest.raises(RuntimeError):
            any_order("mask_names_exited", [9], 32)
        return any_order("votes", [1] * 96, 288, threads=96)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(launches).result() == [FULL, 1, 1] * 96


def test_unwritten_shared_memory(any_order: Emulator) -> None:
    assert any_order("unwritten", [], 64, blocks=2, shared=256) == [0xA5A5A5A5A5A5A5A5] * 64


def test_error_names_the_block(run: Emulator) -> None:
    with pytest.raises(RuntimeError, match=r"^emulation: block 2, thread 1 \(warp 0, lane 1\): __any_sync"):
        run("late_bug", [2], 32, blocks=4)


@pytest.mark.parametrize("vote", [0, 1])
def test_stack_overflow(any_order: Emulator, vote: int) -> None:
    kilobytes = any_order.library.emulation_stack() // 1024
    shallow = any_order("stack_overflow", [kilobytes // 4, vote], 32)
    assert len(set(shallow)) == 1 and shallow[0] > 0
    # Noticed by a collective down there, else when the thread ends.
    with pytest.raises(
        RuntimeError, match=r"lane \d+\): __any_sync.*: stack overflow" if vote else r"lane \d+\): stack"
    ):
        any_order("stack_overflow", [kilobytes + 4, vote], 32)
    assert any_order("stack_overflow", [kilobytes // 4, vote], 32) == shallow


@pytest.mark.parametrize(
    ("blocks", "threads", "shared"), [(0, 32, 0), (1 << 31, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, 49153)]
)
def test_invalid_launch(run: Emulator, blocks: int, threads: int, shared: int) -> None:
    with pytest.raises(RuntimeError, match=f"invalid launch of {blocks} blocks of {threads} threads with {shared} "):
        run("indices", [], 5, blocks=blocks, threads=threads, shared=shared)


def test_collective_outside_of_a_kernel(run: Emulator) -> None:
    message = ctypes.create_string_buffer(100)
    assert run.library.emulation_outside(message, len(message)) == 1
    assert message.value == b"emulation: __syncthreads outside of a kernel"


# ---- Around it


def test_host_threads(any_order: Emulator) -> None:
    """Backward passes launch from threads of their own: shared memory and fibers must not mix."""

    def sums(start: int) -> list[int]:
        return any_order("block_sums", range(start, start + 2000), 3, blocks=3, threads=128)

    expected = [sums(start) for start in range(20)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sums, range(20))) == expected


def test_build_is_incremental() -> None:
    build("check_emulation")
    before = target("check_emulation").stat().st_mtime_ns
    build("check_emulation")
    assert target("check_emulation").stat().st_mtime_ns == before


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_nvcc_knows_the_same_language(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = ["nvcc", "-std=c++20", "-arch=sm_80", "-c", *CHECKS, "-o", str(tmp_path / "check.o")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

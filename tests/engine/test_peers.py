"""What a rank says of another's end; real kills and errors of real ranks are in test_faults.py."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from vitds import dist
from vitds.engine import watchdog
from vitds.engine.peers import Peer, Peers
from vitds.errors import ResourceError
from vitds.runs import lock

CLOSED = "[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:41234"


def words_about(
    log: str, *, error: str = CLOSED, words: str = "", word_type: type[Exception] = ValueError
) -> str:
    """What rank 0 says when a collective fails, after rank 1, as if on another host, has ended by an error
    with these words, if any.
    """
    peers, said = Peers(Path(log)), ""
    peers.others = [dataclasses.replace(peer, host=f"n{peer.rank}") for peer in peers.others]
    if dist.rank() == 1 and words:
        with pytest.raises((ValueError, ResourceError)), peers.watched(lambda error: False):
            raise word_type(words)
    dist.barrier()
    if dist.is_main():
        with (
            pytest.raises(RuntimeError if error != CLOSED else ResourceError) as caught,
            peers.watched(lambda error: False),
        ):
            raise RuntimeError(error)
        said = str(caught.value)
    dist.barrier()
    return said


def test_a_rank_on_another_host_is_not_guessed_at_but_its_address_named(rank_pool, tmp_path: Path) -> None:
    said = rank_pool(2).run(words_about, str(tmp_path / "log.txt"))[0]
    expected = (
        "before the first step a rank at [10.0.0.2]:41234 ended; those elsewhere cannot be looked at "
        "from here: 1 on n1. This rank ends"
    )
    assert said.startswith(expected)


def test_a_rank_on_another_host_that_ended_by_an_error_is_quoted(rank_pool, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("rank 1, process 1, last words: of an earlier start\n")
    said = rank_pool(2).run(words_about, str(tmp_path / "log.txt"), words="image 3 is\nbroken.")[0]
    assert (
        said.startswith("before the first step rank 1 (process ")
        and " on n1) ended: image 3 is broken. This rank ends" in said
    )


def test_what_a_rank_elsewhere_knows_of_the_one_that_ended_is_passed_on(rank_pool, tmp_path: Path) -> None:
    said = rank_pool(2).run(
        words_about, str(tmp_path / "log.txt"), words="Broken pipe [10.0.0.3]:7", word_type=RuntimeError
    )[0]
    assert " on n1) says: a rank at [10.0.0.3]:7 ended; those elsewhere" in said


def test_the_error_of_a_collective_that_no_end_of_a_rank_explains_stays_itself(
    rank_pool, tmp_path: Path
) -> None:
    said = rank_pool(2).run(words_about, str(tmp_path / "log.txt"), error="sizes differ")
    assert said[0] == "sizes differ"


def test_a_process_is_gone_as_a_zombie_and_when_another_has_its_number() -> None:
    with subprocess.Popen(["sleep", "99"]) as process:
        ticks = lock._start_ticks(process.pid)
        peer = dataclasses.replace(Peer.own(), pid=process.pid, ticks=ticks)
        assert not peer.is_gone() and dataclasses.replace(peer, ticks=ticks - 1).is_gone()
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        assert peer.is_gone()
    assert peer.is_gone()


def test_a_rank_that_no_collective_wakes_ends_when_a_peer_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(watchdog, "LOOKS_FOR_PEERS_AFTER_S", 0.0)
    monkeypatch.setattr(watchdog, "LOOKS_EVERY_S", 0.02)
    monkeypatch.setattr(watchdog, "_end", said.append)  # which would end this process
    log = tmp_path / "log.txt"
    peers = Peers(log)
    with subprocess.Popen(["sleep", "99"]) as process:
        ticks = lock._start_ticks(process.pid)
        peers.others = [dataclasses.replace(peers.own, rank=1, pid=process.pid, ticks=ticks)]
        with closing(watchdog.Watchdog(log, peers)) as dog:
            dog.at(7)
            assert dog.waits_for() == []
            process.kill()
            end = time.monotonic() + 30
            while not said and time.monotonic() < end:
                time.sleep(0.01)
    assert f"rank 1 (process {process.pid} on {peers.own.host}) is gone without a message" in said[0]
    assert "This rank ends with it" in said[0] and "last words: ends with another: rank 1" in log.read_text()

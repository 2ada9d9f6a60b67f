import ctypes
import multiprocessing
import os
import platform
import re

import pytest

from gsrl_core.sim import scheduling

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def given_way(answers):
    told = scheduling.give_way()
    buffer = ctypes.create_string_buffer(scheduling._ATTR.size)
    ctypes.CDLL(None).syscall(SCHED_GETATTR[platform.machine()], 0, buffer, scheduling._ATTR.size, 0)
    answers.put((told, scheduling._ATTR.unpack(buffer.raw)))


@pytest.mark.skipif(platform.machine() not in SCHED_GETATTR, reason="the number of the system call is not known")
def test_the_kernel_has_the_policy_the_priority_and_the_slice():
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=given_way, args=(answers,))
    process.start()
    told, (_, policy, _, niceness, _, runtime, *_) = answers.get(timeout=60)
    process.join()
    assert told
    assert policy == os.SCHED_BATCH
    assert niceness == min(os.getpriority(os.PRIO_PROCESS, 0) + 5, 19)
    if tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 12):
        assert runtime == 50_000_000


def test_an_unknown_processor_only_lowers_the_priority(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    steps = []
    monkeypatch.setattr(os, "nice", lambda step: steps.append(step) or step)
    assert scheduling.give_way() is False
    assert steps == [5]

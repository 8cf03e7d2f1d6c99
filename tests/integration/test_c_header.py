# SPDX-License-Identifier: Apache-2.0
"""vmfork.h: builds without a warning as C and C++, and never shows a torn page while a writer updates it.

For arm64 it is built by a cross compiler and run by qemu-aarch64. That shows that the code for arm64 is right in what
it computes. It cannot show a barrier that is missing: the emulated loads keep the order of this machine's, and an x86
never reorders loads. So what the compiler emitted is read as well: the loads in the order that the seqlock needs, and
between them the two instructions that keep arm64 from changing it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vmfork
from support.tools import need, need_root
from vmfork.page import DETECTION_EVENT, PageWriter

INCLUDE = Path(vmfork.__file__).parents[1] / "include"
WARNINGS = ["-O2", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", f"-I{INCLUDE}"]

COMPILERS = {
    "gcc": (["gcc", "-std=c11"], "gcc"),
    "gcc-gnu17": (["gcc", "-std=gnu17", "-Wconversion"], "gcc"),
    "clang": (["clang", "-std=c11"], "clang"),
    "g++": (["g++", "-xc++", "-std=c++11"], "g++"),
    "g++-20": (["g++", "-xc++", "-std=c++20"], "g++"),
    "clang++": (["clang++", "-xc++", "-std=c++17"], "clang"),
    "arm64": (["aarch64-linux-gnu-gcc", "-std=c11", "-static"], "gcc-aarch64-linux-gnu"),
}
ARM64 = [["aarch64-linux-gnu-gcc"], ["clang", "--target=aarch64-linux-gnu"]]

# One consistent copy of the page, as a function whose code can be found.
COPYING = """
#include <vmfork.h>

int copy_of_the_page(vmfork_content *content)
{
    return vmfork_read(content);
}
"""

# Answers single letters on its standard input, so that a test can change the page in between.
ASKING = r"""
#include <vmfork.h>

int main(void)
{
    vmfork_guard guard;
    vmfork_content content;
    unsigned i;
    int letter;

    vmfork_guard_init(&guard);
    while ((letter = getchar()) != EOF) {
        if (letter == 'g')
            printf("%llu", (unsigned long long)vmfork_generation());
        else if (letter == 'f')
            printf("%d", vmfork_forked(&guard));
        else if (letter == 's')
            printf("%d", vmfork_supported());
        else if (letter == 'i')
            printf("%d", vmfork_guard_init(&guard));
        else if (letter == 'r') {
            printf("%d", vmfork_read(&content));
            for (i = 0; i < sizeof(content.token); i++)
                printf("%02x", content.token[i]);
            printf(" %u %u %llu %llu %llu", content.state, content.detection,
                   (unsigned long long)content.generation, (unsigned long long)content.detected_at_ns,
                   (unsigned long long)content.boottime_ns);
        } else
            continue;
        putchar('\n');
        fflush(stdout);
    }
    return 0;
}
"""

# Reads the page as fast as it can until the writer's last generation; argv[1] is how many different ones it must see.
HAMMERING = r"""
#include <vmfork.h>

int main(int argc, char **argv)
{
    long wanted = argc > 1 ? strtol(argv[1], NULL, 10) : 1, seen = 0;
    uint64_t generation = 0, word, last = 0, token[2];
    vmfork_content content;

    while (seen < wanted) {
        word = vmfork_generation();
        /* The writer's generations have two equal halves: a store in two parts would show. */
        if (word != 1 && (uint32_t)word != (uint32_t)(word >> 32))
            return 3;
        if (word < last)
            return 4;
        last = word;
        if (vmfork_read(&content) != 0)
            return 5;
        memcpy(token, content.token, sizeof(token));
        if (content.generation != 1 &&
            (token[0] != content.generation || token[1] != ~content.generation ||
             content.detected_at_ns != content.generation + 1 || content.boottime_ns != content.generation + 2))
            return 6;
        if (content.generation < generation)
            return 7;
        seen += content.generation != generation;
        generation = content.generation;
    }
    return 0;
}
"""

WRITER = """
import sys
from vmfork.page import PageWriter
n = 1
with PageWriter(sys.argv[1]) as writer:
    print("ready", flush=True)
    while True:
        n += 1
        g = n << 32 | n
        token = g.to_bytes(8, "little") + (g ^ (1 << 64) - 1).to_bytes(8, "little")
        writer.publish(generation=g, token=token, detected_at_ns=g + 1, boottime_ns=g + 2)
"""

# The cheapest of many rounds, so that a busy machine does not count.
TIMING = r"""
#define _GNU_SOURCE
#include <time.h>
#include <vmfork.h>

int main(void)
{
    vmfork_guard guard;
    struct timespec begin, end;
    double best = 1e9, taken;
    long round, i, forks = 0;

    if (!vmfork_guard_init(&guard))
        return 2;
    for (round = 0; round < 50; round++) {
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (i = 0; i < 100000; i++) {
            forks += vmfork_forked(&guard);
            __asm__ volatile("" ::: "memory");
        }
        clock_gettime(CLOCK_MONOTONIC, &end);
        taken = (double)(end.tv_sec - begin.tv_sec) * 1e9 + (double)(end.tv_nsec - begin.tv_nsec);
        if (taken / 100000 < best)
            best = taken / 100000;
    }
    printf("%.3f\n", best);
    return forks != 0;
}
"""

# The command that runs the program; the last word of it is the program.
Builder = Callable[[str], list[str]]


@pytest.fixture
def build(tmp_path: Path, request: pytest.FixtureRequest) -> Builder:
    command, package = COMPILERS[request.param]
    compiler = need(command[0], package=package)
    emulator = [need("qemu-aarch64", package="qemu-user")] if request.param == "arm64" else []

    def compiled(source: str) -> list[str]:
        (tmp_path / "program.c").write_text(source)
        output = str(tmp_path / "program")
        arguments = [compiler, *command[1:], *WARNINGS, str(tmp_path / "program.c"), "-o", output]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [*emulator, output]

    return compiled


every_compiler = pytest.mark.parametrize("build", COMPILERS, indirect=True)
any_compiler = pytest.mark.parametrize("build", ["gcc"], indirect=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def page(root: Path) -> Iterator[PageWriter]:
    with PageWriter(str(root / "run/vmfork/generation")) as writer:
        yield writer


class Asking:
    """The running C program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, letter: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(letter)
        self._process.stdin.flush()
        return self._process.stdout.readline().rstrip("\n")


@contextmanager
def asking(program: list[str], root: Path) -> Iterator[Asking]:
    environment = {**os.environ, "VMFORK_ROOT": str(root)}
    with subprocess.Popen(
        program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Asking(process)
        process.communicate(timeout=30)
    assert process.returncode == 0


@every_compiler
def test_it_reads_what_the_writer_published(build: Builder, root: Path, page: PageWriter) -> None:
    with asking(build(ASKING), root) as ask:
        assert (ask("g"), ask("s"), ask("f")) == ("1", "0", "0")
        page.publish(
            generation=2**64 - 1, token=bytes(range(16)), detected_at_ns=3, boottime_ns=4, detection=DETECTION_EVENT
        )
        assert (ask("f"), ask("f"), ask("s")) == ("1", "0", "1")
        assert ask("g") == str(2**64 - 1)
        assert ask("r") == f"0{bytes(range(16)).hex()} 1 2 {2**64 - 1} 3 4"


@any_compiler
def test_a_page_that_comes_later_is_opened(build: Builder, root: Path) -> None:
    with asking(build(ASKING), root) as ask:
        assert (ask("g"), ask("s"), ask("f"), ask("i")) == ("0", "0", "0", "0")
        assert ask("r").startswith("2")
        with PageWriter(str(root / "run/vmfork/generation")) as writer:
            assert (ask("f"), ask("g")) == ("0", "1")
            writer.publish(generation=2, token=bytes(16), detected_at_ns=0, boottime_ns=0)
            assert (ask("f"), ask("f")) == ("1", "0")


@any_compiler
@pytest.mark.parametrize("content", [b"", b"VMFK" * 5, bytes(4096), b"VMFK" + bytes(4092)])
def test_a_file_that_is_no_page_is_none(build: Builder, root: Path, content: bytes) -> None:
    (root / "run/vmfork").mkdir(parents=True)
    (root / "run/vmfork/generation").write_bytes(content)
    with asking(build(ASKING), root) as ask:
        assert (ask("g"), ask("f"), ask("s")) == ("0", "0", "0")


@any_compiler
def test_a_page_left_odd_ends_in_a_bounded_time(build: Builder, root: Path, page: PageWriter) -> None:
    path = root / "run/vmfork/generation"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\1")
    with asking(build(ASKING), root) as ask:
        assert ask("r").startswith("11")
        assert ask("g") == "1"


@any_compiler
def test_a_set_user_id_program_ignores_the_environment(build: Builder, root: Path, page: PageWriter) -> None:
    need_root()
    command = build(ASKING)
    program = command[-1]
    os.chown(program, 65534, 65534)
    os.chmod(program, 0o6755)
    for directory in (root.parent, *root.parent.parents):
        if directory == Path("/"):
            break
        if not directory.stat().st_mode & 0o001:
            directory.chmod(directory.stat().st_mode | 0o011)
    with asking(command, root) as ask:
        expected = "0" if not Path("/run/vmfork/generation").exists() else None
        assert ask("g") == expected or expected is None
        os.chmod(program, 0o755)
    with asking(command, root) as ask:
        assert ask("g") == "1"


@every_compiler
def test_no_read_is_ever_torn_while_a_writer_updates_in_a_tight_loop(build: Builder, root: Path) -> None:
    program = build(HAMMERING)
    path = str(root / "run/vmfork/generation")
    environment = {**os.environ, "PYTHONPATH": str(INCLUDE.parent)}
    with subprocess.Popen([sys.executable, "-c", WRITER, path], env=environment, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            done = subprocess.run(
                [*program, "5000"], env={**os.environ, "VMFORK_ROOT": str(root)}, timeout=30, check=False
            )
        finally:
            writer.kill()
    assert done.returncode == 0


@any_compiler
def test_asking_costs_a_load_and_a_comparison(build: Builder, root: Path, page: PageWriter) -> None:
    environment = {**os.environ, "VMFORK_ROOT": str(root)}
    done = subprocess.run(build(TIMING), env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 2.0


@every_compiler
def test_two_source_files_of_one_program_may_include_it(build: Builder, tmp_path: Path) -> None:
    (tmp_path / "other.inc").write_text("#include <vmfork.h>\n#include <vmfork.h>\n")
    build('#include "other.inc"\nint main(void) { return (int)vmfork_supported(); }\n')


@pytest.mark.parametrize("compiler", ARM64, ids=lambda one: one[0])
def test_on_arm64_the_loads_of_a_copy_are_kept_in_order(compiler: list[str], tmp_path: Path) -> None:
    need("aarch64-linux-gnu-gcc", package="gcc-aarch64-linux-gnu")
    command = [need(compiler[0], package="clang"), *compiler[1:], "-std=c11", *WARNINGS, "-S", "-xc", "-", "-o", "-"]
    done = subprocess.run(command, input=COPYING, capture_output=True, text=True, check=True)
    (function,) = re.findall(r"^copy_of_the_page:.*?$(.*?)\.size\s+copy_of_the_page", done.stdout, re.M | re.S)
    loads_and_barriers = re.findall(r"^\s+(ldar|ldapr|ldr|ldp|dmb)\s+([wx]\d+|ishld)", function, re.M)
    before, _, after = ("\n".join(map(" ".join, loads_and_barriers)) + "\n").partition("dmb ishld\n")
    # seq by an acquire load; state, generation, two times, token in two words, detection; the barrier; seq once more.
    assert re.search(r"^(ldar|ldapr) w\d+\n(ldr [wx]\d+\n){7}\Z", before, re.M), loads_and_barriers
    assert re.match(r"ldr w\d+\n", after), loads_and_barriers

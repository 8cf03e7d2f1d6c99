# SPDX-License-Identifier: Apache-2.0
"""Devices and their addresses in devicetrees that the real dtc compiled."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from support.flattree import compile_tree, grow, unflatten
from vmfork.errors import AbsentError, InputError
from vmfork.paths import Paths
from vmfork.truths import Truth
from vmfork.truths.devicetree import VMCLOCK, VMGENID, DeviceRegion, DeviceTreeGenerationId, locate

# The node of Documentation/devicetree/bindings/rng/microsoft,vmgenid.yaml, on a bus as the binding's checker makes it.
BINDING_EXAMPLE = """
/ {
    #address-cells = <1>;
    #size-cells = <1>;
    interrupt-parent = <&gic>;
    gic: interrupt-controller { interrupt-controller; #interrupt-cells = <3>; };
    rng@80000000 {
        compatible = "microsoft,vmgenid";
        reg = <0x80000000 0x1000>;
        interrupts = <0 35 1>;
    };
};
"""

# Firecracker on arm64: no unit address, 64-bit address and size, and a vmclock whose unit address is decimal.
FIRECRACKER = """
/ {
    #address-cells = <2>;
    #size-cells = <2>;
    vmgenid {
        compatible = "microsoft,vmgenid";
        reg = <0x0 0x801ffff0 0x0 0x10>;
        interrupts = <0 35 1>;
    };
    ptp@2149576704 {
        compatible = "amazon,vmclock";
        reg = <0x0 0x801fe000 0x0 0x1000>;
        interrupts = <0 36 1>;
    };
};
"""

VMGENID_PROPERTIES = 'compatible = "microsoft,vmgenid"; interrupts = <0 35 1>;'


def guest_with(tmp_path: Path, source: str) -> Paths:
    paths = Paths(str(tmp_path))
    grow(source, Path(paths.device_tree_sysfs))
    return paths


def region_in(tmp_path: Path, source: str) -> DeviceRegion:
    return locate(guest_with(tmp_path, source), VMGENID)


def wide(body: str) -> str:
    """A root with 64-bit addresses and sizes."""
    return "/ { #address-cells = <2>; #size-cells = <2>; " + body + " };"


def test_example_of_the_binding(tmp_path: Path) -> None:
    region = region_in(tmp_path, BINDING_EXAMPLE)
    assert region == DeviceRegion(node="/rng@80000000", address=0x80000000, size=0x1000, has_interrupt=True)


def test_firecracker_node_without_unit_address(tmp_path: Path) -> None:
    region = region_in(tmp_path, FIRECRACKER)
    assert region == DeviceRegion(node="/vmgenid", address=0x801FFFF0, size=16, has_interrupt=True)


def test_firecracker_vmclock_with_a_decimal_unit_address(tmp_path: Path) -> None:
    region = locate(guest_with(tmp_path, FIRECRACKER), VMCLOCK)
    assert region == DeviceRegion(node="/ptp@2149576704", address=0x801FE000, size=0x1000, has_interrupt=True)


def test_unit_address_that_contradicts_reg_is_ignored(tmp_path: Path) -> None:
    source = wide(f"rng@1000 {{ {VMGENID_PROPERTIES} reg = <0 0x2000 0 16>; }};")
    assert region_in(tmp_path, source).address == 0x2000


def test_address_above_four_gigabytes(tmp_path: Path) -> None:
    source = wide(f"rng {{ {VMGENID_PROPERTIES} reg = <0x12 0x34567890 0 16>; }};")
    assert region_in(tmp_path, source).address == 0x12_34567890


def test_cell_counts_default_to_two_and_one(tmp_path: Path) -> None:
    region = region_in(tmp_path, f"/ {{ rng {{ {VMGENID_PROPERTIES} reg = <1 0x2000 0x1000>; }}; }};")
    assert (region.address, region.size) == (0x1_00002000, 0x1000)


def test_cell_counts_are_not_inherited_from_the_bus_above(tmp_path: Path) -> None:
    source = f"/ {{ #address-cells = <1>; #size-cells = <1>; soc {{ ranges; rng {{ {VMGENID_PROPERTIES}"
    region = region_in(tmp_path, source + " reg = <0 0x2000 0x1000>; }; }; };")
    assert (region.address, region.size) == (0x2000, 0x1000)


def test_empty_ranges_are_the_identity(tmp_path: Path) -> None:
    source = wide(
        f"soc {{ #address-cells = <2>; #size-cells = <2>; ranges; rng {{ {VMGENID_PROPERTIES}"
        " reg = <0 0x3000 0 0x1000>; }; };"
    )
    assert region_in(tmp_path, source) == DeviceRegion(node="/soc/rng", address=0x3000, size=0x1000, has_interrupt=True)


def test_nested_buses_with_other_cell_counts_are_translated_one_by_one(tmp_path: Path) -> None:
    source = wide(
        """
        outer {
            #address-cells = <1>;
            #size-cells = <2>;
            ranges = <0x0 0x9 0x0 0x0 0x1000>, <0x10000000 0x8 0x40000000 0x0 0x10000000>;
            inner {
                #address-cells = <3>;
                #size-cells = <1>;
                ranges = <0x7 0x0 0x100 0x10200000 0x10000>;
                rng {
                    compatible = "vendor,thing", "microsoft,vmgenid";
                    reg = <0x7 0x0 0x180 0x20>;
                    interrupts = <1>;
                };
            };
        };
        """
    )
    # 0x180 is 0x80 into the inner window, hence 0x10200080 outside, which is 0x200080 into the outer one.
    assert region_in(tmp_path, source) == DeviceRegion(
        node="/outer/inner/rng", address=0x8_40200080, size=0x20, has_interrupt=True
    )


def test_bus_without_ranges_cannot_be_reached(tmp_path: Path) -> None:
    source = wide(
        f"i2c {{ #address-cells = <1>; #size-cells = <1>; rng {{ {VMGENID_PROPERTIES} reg = <0x50 16>; }}; }};"
    )
    with pytest.raises(InputError, match="/i2c/ranges: is missing"):
        region_in(tmp_path, source)


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ("<0x0 0x40000000>", "has 8 bytes"),
        ("<0x0 0x40000000 0x1000 0x0>", "has 16 bytes"),
        ("<0x0 0x40000000 0x800>", "no entry that covers"),
        ("<0x4000 0x40000000 0x1000>", "no entry that covers"),
        ("<0x0 0x40000000 0x100f>", "no entry that covers"),
    ],
)
def test_ranges_too_short_for_an_entry_or_for_the_device(tmp_path: Path, ranges: str, problem: str) -> None:
    source = f"""/ {{ #address-cells = <1>; #size-cells = <1>;
        soc {{ #address-cells = <1>; #size-cells = <1>; ranges = {ranges};
            rng {{ {VMGENID_PROPERTIES} reg = <0x1000 0x10>; }}; }}; }};"""
    with pytest.raises(InputError, match=f"/soc/ranges: .*{problem}"):
        region_in(tmp_path, source)


def test_ranges_that_end_with_the_device_are_enough(tmp_path: Path) -> None:
    source = f"""/ {{ #address-cells = <1>; #size-cells = <1>;
        soc {{ #address-cells = <1>; #size-cells = <1>; ranges = <0x0 0x40000000 0x1010>;
            rng {{ {VMGENID_PROPERTIES} reg = <0x1000 0x10>; }}; }}; }};"""
    assert region_in(tmp_path, source).address == 0x40001000


@pytest.mark.parametrize("size", range(1, 16))
def test_truncated_reg_is_an_error_that_names_it(tmp_path: Path, size: int) -> None:
    paths = guest_with(tmp_path, FIRECRACKER)
    reg = Path(paths.device_tree_sysfs, "vmgenid/reg")
    reg.write_bytes(reg.read_bytes()[:size])
    with pytest.raises(InputError, match=f"/vmgenid/reg: has {size} bytes"):
        locate(paths, VMGENID)


@pytest.mark.parametrize("size", [17, 20, 24, 28, 31])
def test_reg_with_half_an_entry_more_is_an_error(tmp_path: Path, size: int) -> None:
    paths = guest_with(tmp_path, FIRECRACKER)
    reg = Path(paths.device_tree_sysfs, "vmgenid/reg")
    reg.write_bytes(reg.read_bytes().ljust(size, b"\0"))
    with pytest.raises(InputError, match=f"/vmgenid/reg: has {size} bytes"):
        locate(paths, VMGENID)


def test_first_of_two_entries_of_reg_is_the_device(tmp_path: Path) -> None:
    source = wide(f"rng {{ {VMGENID_PROPERTIES} reg = <0 0x1000 0 16>, <0 0x2000 0 16>; }};")
    assert region_in(tmp_path, source).address == 0x1000


@pytest.mark.parametrize("reg", ["", "reg;"])
def test_node_without_an_address_is_an_error(tmp_path: Path, reg: str) -> None:
    with pytest.raises(InputError, match="/rng/reg: "):
        region_in(tmp_path, wide(f"rng {{ {VMGENID_PROPERTIES} {reg} }};"))


def test_device_smaller_than_a_generation_id_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/rng/reg: covers 15 bytes"):
        region_in(tmp_path, wide(f"rng {{ {VMGENID_PROPERTIES} reg = <0 0x1000 0 15>; }};"))


def test_device_beyond_all_addresses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beyond 64-bit"):
        region_in(tmp_path, wide(f"rng {{ {VMGENID_PROPERTIES} reg = <0xffffffff 0xfffffff8 0 16>; }};"))


@pytest.mark.parametrize("count", [0, 5, 0xFFFFFFFF])
def test_absurd_cell_count_is_an_error(tmp_path: Path, count: int) -> None:
    paths = guest_with(tmp_path, FIRECRACKER)
    Path(paths.device_tree_sysfs, "#address-cells").write_bytes(count.to_bytes(4, "big"))
    with pytest.raises(InputError, match=f"/#address-cells: is {count}"):
        locate(paths, VMGENID)


def test_node_without_interrupts_is_found_and_reported(tmp_path: Path) -> None:
    region = region_in(tmp_path, wide('rng { compatible = "microsoft,vmgenid"; reg = <0 0x1000 0 16>; };'))
    assert not region.has_interrupt


def test_extended_interrupts_count_as_interrupts(tmp_path: Path) -> None:
    region = region_in(
        tmp_path,
        wide("""gic: gic { interrupt-controller; #interrupt-cells = <1>; };
             rng { compatible = "microsoft,vmgenid"; reg = <0 0x1000 0 16>; interrupts-extended = <&gic 3>; };"""),
    )
    assert region.has_interrupt


@pytest.mark.parametrize("status", ["okay", "ok"])
def test_enabled_device_is_found(tmp_path: Path, status: str) -> None:
    source = wide(f'rng {{ {VMGENID_PROPERTIES} reg = <0 0x1000 0 16>; status = "{status}"; }};')
    assert region_in(tmp_path, source).address == 0x1000


@pytest.mark.parametrize("status", ["disabled", "fail", "reserved", "okayish", ""])
def test_disabled_device_is_absent(tmp_path: Path, status: str) -> None:
    source = wide(f'rng {{ {VMGENID_PROPERTIES} reg = <0 0x1000 0 16>; status = "{status}"; }};')
    with pytest.raises(AbsentError, match=r"/rng: .*disabled"):
        region_in(tmp_path, source)


def test_device_on_a_disabled_bus_is_absent(tmp_path: Path) -> None:
    source = wide(
        f"""soc {{ status = "disabled"; ranges; #address-cells = <2>; #size-cells = <2>;
            rng {{ {VMGENID_PROPERTIES} reg = <0 0x1000 0 16>; }}; }};"""
    )
    with pytest.raises(AbsentError, match=r"/soc/rng: .*disabled"):
        region_in(tmp_path, source)


def test_disabled_device_does_not_hide_an_enabled_one(tmp_path: Path) -> None:
    source = wide(
        f"""rng@1000 {{ {VMGENID_PROPERTIES} reg = <0 0x1000 0 16>; status = "disabled"; }};
            rng@2000 {{ {VMGENID_PROPERTIES} reg = <0 0x2000 0 16>; }};"""
    )
    assert region_in(tmp_path, source).address == 0x2000


def test_compatible_is_compared_as_linux_does(tmp_path: Path) -> None:
    source = wide('rng { compatible = "a,b", "Microsoft,VMGENID"; reg = <0 0x1000 0 16>; };')
    assert region_in(tmp_path, source).address == 0x1000


@pytest.mark.parametrize("compatible", ["microsoft,vmgenid2", "xmicrosoft,vmgenid", "microsoft"])
def test_similar_name_is_not_compatible(tmp_path: Path, compatible: str) -> None:
    source = wide(f'rng {{ compatible = "{compatible}"; reg = <0 0x1000 0 16>; }};')
    with pytest.raises(AbsentError, match="no node is compatible with microsoft,vmgenid"):
        region_in(tmp_path, source)


def test_guest_without_a_tree_is_absent(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="no devicetree"):
        locate(Paths(str(tmp_path)), VMGENID)


def test_tree_below_proc_alone_is_enough(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    grow(FIRECRACKER, Path(paths.device_tree))
    assert locate(paths, VMGENID).node == "/vmgenid"


def test_tree_that_leads_out_of_the_root_is_refused(tmp_path: Path) -> None:
    outside = grow(FIRECRACKER, tmp_path / "outside")
    paths = Paths(str(tmp_path / "root"))
    Path(paths.device_tree).parent.mkdir(parents=True)
    Path(paths.device_tree).symlink_to(outside)
    with pytest.raises(AbsentError, match="no devicetree"):
        locate(paths, VMGENID)


def test_symbolic_links_are_never_followed(tmp_path: Path) -> None:
    paths = guest_with(tmp_path, wide("soc { };"))
    root = Path(paths.device_tree_sysfs)
    grow(FIRECRACKER, tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "soc/loop").symlink_to("..")
    (root / "elsewhere").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AbsentError, match="no node is compatible"):
        locate(paths, VMGENID)


def test_property_that_is_a_link_or_a_fifo_is_not_read(tmp_path: Path) -> None:
    paths = guest_with(tmp_path, FIRECRACKER)
    reg = Path(paths.device_tree_sysfs, "vmgenid/reg")
    reg.rename(tmp_path / "reg")
    reg.symlink_to(tmp_path / "reg")
    with pytest.raises(InputError, match="vmgenid/reg: is missing"):
        locate(paths, VMGENID)
    reg.unlink()
    os.mkfifo(reg)
    with pytest.raises(AbsentError, match="vmgenid/reg"):
        locate(paths, VMGENID)


def test_oversized_property_is_an_error_that_names_it(tmp_path: Path) -> None:
    paths = guest_with(tmp_path, FIRECRACKER)
    Path(paths.device_tree_sysfs, "vmgenid/compatible").write_bytes(b"x" * 70_000)
    with pytest.raises(InputError, match="vmgenid/compatible: is larger than"):
        locate(paths, VMGENID)


def test_tree_of_absurd_depth_is_an_error(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    Path(paths.device_tree_sysfs, *["n"] * 65).mkdir(parents=True)
    with pytest.raises(InputError, match="deeper than 64"):
        locate(paths, VMGENID)


def test_error_about_a_strangely_named_node_can_be_printed(tmp_path: Path) -> None:
    paths = guest_with(tmp_path, wide(""))
    node = os.fsencode(paths.device_tree_sysfs) + b"/rng\xff\n"
    os.mkdir(node)
    with open(node + b"/compatible", "wb") as compatible:
        compatible.write(b"microsoft,vmgenid\0")
    with pytest.raises(InputError) as caught:
        locate(paths, VMGENID)
    assert str(caught.value).isprintable()


def test_ten_thousand_nodes_are_searched_in_seconds(tmp_path: Path) -> None:
    bus = "bus@{0:x} {{ #address-cells = <1>; #size-cells = <1>; ranges; {1} }};"
    device = 'dev@{0:x} {{ compatible = "vendor,thing"; reg = <0x{0:x} 0x10>; }};'
    buses = [bus.format(number, "".join(device.format(n * 16) for n in range(100))) for number in range(100)]
    last = bus.format(100, f"rng@5000 {{ {VMGENID_PROPERTIES} reg = <0x5000 0x10>; }};")
    paths = Paths(str(tmp_path))
    source = "/ { #address-cells = <1>; #size-cells = <1>; " + "".join(buses) + last + "};"
    unflatten(compile_tree(source), Path(paths.device_tree_sysfs))
    begin = time.monotonic()
    region = locate(paths, VMGENID)
    assert (region.node, region.address) == ("/bus@64/rng@5000", 0x5000)
    # Half a second on a slow machine; anything quadratic takes minutes.
    assert time.monotonic() - begin < 10


class FileMemory:
    """Physical memory that a file holds; counts how often it is asked."""

    def __init__(self, path: Path, base: int) -> None:
        self._path = path
        self._base = base
        self.reads = 0

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        with self._path.open("rb") as memory:
            return os.pread(memory.fileno(), size, address - self._base)


def test_generation_id_is_read_from_memory_every_time(tmp_path: Path) -> None:
    paths = guest_with(tmp_path, FIRECRACKER)
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(0xFFF0) + b"A" * 16 + b"Z")
    truth: Truth = DeviceTreeGenerationId(paths, FileMemory(ram, 0x801F0000))
    first = truth.read()
    ram.write_bytes(bytes(0xFFF0) + b"B" * 16)
    assert (truth.name, first, truth.read()) == ("devicetree", b"A" * 16, b"B" * 16)


def test_short_memory_is_an_error_that_names_the_node(tmp_path: Path) -> None:
    paths = guest_with(tmp_path, FIRECRACKER)
    ram = tmp_path / "ram"
    ram.write_bytes(bytes(0xFFF0) + b"SECRET")
    with pytest.raises(InputError, match=r"^/vmgenid: .* 6 bytes") as caught:
        DeviceTreeGenerationId(paths, FileMemory(ram, 0x801F0000)).read()
    assert "SECRET" not in str(caught.value)


def test_memory_is_not_touched_without_a_device(tmp_path: Path) -> None:
    paths = guest_with(tmp_path, wide(""))
    memory = FileMemory(tmp_path / "ram", 0)
    truth = DeviceTreeGenerationId(paths, memory)
    for _ in range(2):
        with pytest.raises(AbsentError, match="no node is compatible"):
            truth.read()
    assert memory.reads == 0


def test_tree_that_appears_or_is_replaced_later_is_searched_anew(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    truth = DeviceTreeGenerationId(paths, FileMemory(tmp_path / "ram", 0))
    with pytest.raises(AbsentError, match="no devicetree"):
        truth.region()
    tree = grow(FIRECRACKER, Path(paths.device_tree_sysfs))
    assert truth.region().address == 0x801FFFF0
    tree.rename(tmp_path / "old")
    grow(BINDING_EXAMPLE, tree)
    assert truth.region().address == 0x80000000

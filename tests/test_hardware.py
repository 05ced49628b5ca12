import subprocess
from dataclasses import replace

import pytest

from cluster.hardware import GPUS, VNNI, UnknownHardware, declared, detect, parse_cpuinfo, parse_nvidia_smi, ray_name

GIB = 2**30


def test_every_nvidia_gpu_that_ray_names_can_be_declared() -> None:
    from ray.util.accelerators import accelerators

    names = {value for key, value in vars(accelerators).items() if key.startswith("NVIDIA_")}
    assert names
    assert names <= set(GPUS)


def test_names_follow_rays_own_rule() -> None:
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    rule = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type
    boards = [
        "NVIDIA A10G",
        "NVIDIA L4",
        "Tesla V100-SXM2-16GB",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA H100 80GB HBM3",
        "Tesla T4",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA RTX A6000",
    ]
    assert [ray_name(board) for board in boards] == [rule(board) for board in boards]
    assert {ray_name(board) for board in boards} - {"A100"} <= set(GPUS)


@pytest.mark.parametrize(
    ("name", "gib"), [("A100-40G", 40), ("A100-80G", 80), ("A10G", 22.49), ("L4", 22.49), ("H100", 79.65), ("T4", 15)]
)
def test_memory_is_what_nvidia_smi_reports(name: str, gib: float) -> None:
    gpu = declared(gpu=name).gpu
    assert gpu is not None
    assert gpu.memory_bytes / GIB == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize(
    ("name", "has_bf16"),
    [("T4", False), ("V100", False), ("A10G", True), ("A100-80G", True), ("L4", True), ("H100", True)],
)
def test_bf16_comes_with_ampere(name: str, has_bf16: bool) -> None:
    gpu = declared(gpu=name).gpu
    assert gpu is not None
    assert gpu.has_bf16 == has_bf16


def test_names_are_found_in_any_case_and_counts_are_kept() -> None:
    node = declared(gpu="a100-80g", num_gpus=2)
    assert node.gpu is GPUS["A100-80G"]
    assert (node.num_gpus, node.num_cpus, node.ram_bytes) == (2, 16, 320 * GIB)
    assert str(node) == "2 x A100-80G (80.0 GiB each), 16 cores, 320.0 GiB RAM"


def test_a_cpu_node_can_be_declared() -> None:
    node = declared(gpu=None, num_cpus=2, ram_bytes=24 * GIB)
    assert (node.gpu, node.num_gpus, node.num_cpus, node.ram_bytes) == (None, 0, 2, 24 * GIB)
    assert str(node) == "CPU (2 cores, 24.0 GiB RAM)"


def test_an_unknown_gpu_offers_the_nearest_names() -> None:
    with pytest.raises(UnknownHardware, match=r"No GPU called 'A100-80'; near it: .*A100-80G"):
        declared(gpu="A100-80")


@pytest.mark.parametrize("numbers", [{"num_gpus": 0}, {"num_gpus": -1}, {"ram_bytes": 0}, {"num_cpus": -4}])
def test_numbers_that_no_machine_has_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UnknownHardware, match="positive numbers"):
        declared(gpu="H100", **numbers)


def test_this_machine_is_described_within_its_limits() -> None:
    import os

    node = detect()
    assert node.num_cpus == len(os.sched_getaffinity(0))
    assert GIB < node.ram_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (node.gpu is None) == (node.num_gpus == 0)


def test_the_answer_of_nvidia_smi_is_read() -> None:
    gpus = parse_nvidia_smi("NVIDIA A10G, 23028, 8.6\nNVIDIA A10G, 23028, 8.6\n")
    assert [(gpu.name, gpu.memory_bytes, gpu.compute_capability) for gpu in gpus] == [
        ("A10G", 23028 * 2**20, (8, 6))
    ] * 2


def test_gpus_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA H100 80GB HBM3, 81559, 9.0\n", stderr="")
    monkeypatch.setattr("cluster.hardware.shutil.which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("cluster.hardware.subprocess.run", lambda *_, **__: answer)
    node = detect()
    assert node.gpu == GPUS["H100"]
    assert node.num_gpus == 1


def test_a_driver_without_a_device_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 9, stdout="NVIDIA-SMI has failed", stderr="")
    monkeypatch.setattr("cluster.hardware.shutil.which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("cluster.hardware.subprocess.run", lambda *_, **__: answer)
    assert detect().gpu is None


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni avx512f_like\nbugs\t: x\n",
            ("avx512f", "avx512_vnni"),
        ),
        ("flags : fpu avx2 avx_vnni\nflags : avx512f\n", ("avx_vnni",)),
        ("flags : fpu sse2\n", ()),
        ("processor : 0\nFeatures : fp asimd\n", None),
    ],
)
def test_what_a_cpu_multiplies_is_in_its_flags(text: str, features: tuple[str, ...] | None) -> None:
    assert parse_cpuinfo(text) == features


def test_a_cpu_has_a_feature_has_not_or_is_not_here() -> None:
    here = replace(declared(gpu=None), cpu_features=("avx_vnni",))
    assert (here.has_cpu_feature("avx512f"), here.has_cpu_feature(*VNNI)) == (False, True)
    assert declared(gpu=None).has_cpu_feature("avx512f") is None

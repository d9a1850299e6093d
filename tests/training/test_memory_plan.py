"""The memory plan against a run's own tensors: weights, optimisers, averages and activations, counted one by one."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from ratiograph import config
from ratiograph.core.contracts import Needs
from ratiograph.core.types import Condition
from ratiograph.networks.architectures.stable_diffusion_unets import SD15UNet, SDXLUNet
from ratiograph.networks.lora import LoRA, share_bases
from ratiograph.training.memory_plan import activations, explained, memory_plan, render, shortage

UNET = {"resolution": 16, "block_out_channels": (32, 64), "cross_attention_dim": 12, "norm_groups": 4}
SD15 = UNET | {"attention_heads": 4, "layers_per_block": 1}
RUN = "gin/sd15_reward_tilt.gin"
LORA = "gin/base/sd15_lora.gin"


def built(*files, meta=True, **sizes):
    bindings = [f"SD15UNet.{name} = {value!r}" for name, value in (sizes or SD15).items()]
    bindings += ["TARGET = @MatchTeacher()", "TEACHER = None", "EMPTY_PROMPT = 'none'"]
    cfg = config.parse([RUN, *files], bindings)
    if not meta:
        return config.build(cfg).task
    with torch.device("meta"):
        return config.build(cfg).task


def size_of(tensors):
    unique = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(unique.values())


@pytest.mark.parametrize("files", [(), (LORA,)])
def test_weights_optimisers_and_average_are_a_run_s_own(files):
    task = built(*files, meta=False)
    task.teacher.unconditional.load = lambda: None
    task.prepare(torch.device("cpu"), None)
    for updater in task.optimizers.values():
        for parameter in updater.parameters:
            parameter.grad = torch.ones_like(parameter)
        gradients = size_of(parameter.grad for parameter in updater.parameters)
        assert gradients > 0
    found = {node.name: node for node in memory_plan(built(*files), "fp32").nodes}
    networks = {"teacher": task.teacher, "student": task.student, "student_score": task.student_score}
    for name, network in networks.items():
        assert found[name].weights == size_of(network.parameters())
        assert found[name].parameters == sum(p.numel() for p in network.parameters())
        learning = [p for p in network.parameters() if p.requires_grad] if name != "teacher" else []
        assert found[name].gradients == size_of(p.grad for p in learning)
    for name in ("student", "student_score"):
        updater = task.optimizers[name]
        updater.step()
        moments = [m for state in updater.rule.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
        assert found[name].optimizer == size_of(moments)
    shared = {p.data_ptr() for p in task.student.parameters()}
    assert found["student"].average == size_of(p for p in task.average.parameters() if p.data_ptr() not in shared)


@pytest.mark.parametrize(("betas", "each"), [((0.0, 0.999), 4), ((0.9, 0.999), 8)])
def test_moments_by_adam_s_betas(betas, each):
    with torch.device("meta"):
        task = config.build(config.parse(["gin/mnist_sba.gin"], [f"Adam.betas = {betas}"])).task
    for node in memory_plan(task, "fp32").nodes:
        assert node.optimizer == (each * node.trained if node.name != "teacher" else 0)


def test_moments_in_8_bits_are_a_run_s_own():
    pytest.importorskip("torchao")
    file = "gin/base/adam_8bit.gin"
    task = built(file, meta=False)
    task.teacher.unconditional.load = lambda: None
    task.prepare(torch.device("cpu"), None)
    found = {node.name: node for node in memory_plan(built(file), "fp32").nodes}
    for name in ("student", "student_score"):
        updater = task.optimizers[name]
        for parameter in updater.parameters:
            parameter.grad = torch.ones_like(parameter)
        updater.step()
        held = [(key, t) for state in updater.rule.state.values() for key, t in state.items() if key != "step"]
        maps = 1024 * sum(key.endswith(".codes") for key, _ in held)
        assert found[name].optimizer == size_of(t for _, t in held) + maps
        assert found[name].optimizer < 0.5 * 8 * found[name].trained


def test_a_shared_base_is_counted_once():
    with torch.device("meta"):
        task = built(LORA)
    separate = memory_plan(task, "fp32").held()
    for denoiser in (task.teacher.denoiser, task.student.denoiser, task.student_score):
        denoiser.weights = "one place"
    share_bases(task.teacher, task.student, task.student_score)
    base = sum(p.numel() for p in task.teacher.parameters())
    assert separate - memory_plan(task, "fp32").held() == 2 * 4 * base


def test_the_teacher_is_held_in_half_precision():
    from ratiograph.networks.denoisers import freeze

    task = built(meta=False)
    freeze(task.teacher, torch.bfloat16)
    (found,) = [node for node in memory_plan(built(), "bf16").nodes if node.name == "teacher"]
    assert found.weights == size_of(task.teacher.parameters())


def real_pass(network, condition):
    """Bytes that a pass on the CPU keeps, of tensors that are no parameters."""
    known, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.decode(network.encode(torch.randn(1, *network.shape), torch.tensor([5.0]), condition))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_a_real_pass_s(kind, checkpointing):
    def make():
        if kind == "sdxl":
            sizes = {"transformer_layers": (1, 2), "attention_heads": (2, 4), "pooled_width": 10, "size_embedding": 4}
            return SDXLUNet(**UNET, **sizes, layers_per_block=1, gradient_checkpointing=checkpointing)
        network = SD15UNet(**SD15, gradient_checkpointing=checkpointing)
        return LoRA(network=network, rank=2) if kind == "lora" else network

    text = torch.randn(1, 77, 12)
    condition = Condition(text=text)
    if kind == "sdxl":
        condition = Condition(text=text, pooled=torch.randn(1, 10), sizes=torch.ones(1, 6))
    network = make().train()
    with torch.device("meta"):
        planned = activations(make())
    assert planned["fp32"].kept == pytest.approx(real_pass(network, condition), rel=0.05)
    network.unet.disable_gradient_checkpointing()
    assert planned["fp32"].whole == pytest.approx(real_pass(network, condition), rel=0.05)
    assert planned["bf16"].kept == planned["fp32"].kept // 2
    assert (planned["fp32"].block > 0) == checkpointing
    assert planned["fp32"].kept + planned["fp32"].block < planned["fp32"].whole or not checkpointing


def test_full_size_numbers_and_table():
    with torch.device("meta"):
        task = config.build(config.parse([RUN], ["TARGET = @MatchTeacher()"])).task
    plan = memory_plan(task, "bf16")
    each = plan.activations["bf16"]
    assert (plan.passes, plan.held_by(3, "bf16")) == (1, 3 * (each.kept + each.block))
    student = next(node for node in plan.nodes if node.name == "student")
    assert student.trained == 859_520_964
    assert student.total == 5 * 4 * 859_520_964
    table = render(plan, 32)
    assert "859,520,964" in table
    assert "17.19" in table  # 20 bytes a parameter
    assert all(len(line) <= 120 for line in table.splitlines())
    assert f"{plan.held(8) / 1e9:.2f}" in table


def test_a_tilt_by_the_exact_jacobian_holds_the_teacher_s_two_halves_too():
    task = built()
    task.objective.terms["distribution"].target.needs = Needs(teacher_gradient=True)
    plan = memory_plan(task, "fp32")
    each = plan.activations["fp32"]
    assert (plan.passes, plan.held_by(2, "fp32")) == (3, 2 * (3 * each.kept + each.block))


def test_other_tasks():
    with torch.device("meta"):
        teacher, nothing = (config.build(config.parse([f"gin/mnist_{n}.gin"])).task for n in ("teacher", "classifier"))
    (node,) = memory_plan(teacher, "fp32").nodes
    assert node.total == 5 * 4 * sum(p.numel() for p in teacher.denoiser.parameters())
    assert memory_plan(nothing, "fp32").nodes == ()
    assert render(memory_plan(nothing, "fp32"), 1) == ""


def test_a_device_that_is_too_small_is_told(monkeypatch):
    """The numbers are those of the plan; what is built already is not asked for twice."""
    task = config.build(config.parse(["gin/mnist_sba.gin"])).task
    needed = memory_plan(task, "fp32").held() / 1e9
    built = sum(parameter.nbytes for parameter in task.parameters()) / 1e9
    cpu = torch.device("cpu")
    monkeypatch.setattr("ratiograph.training.memory_plan.available_memory", lambda device: needed - built + 0.001)
    assert shortage(task, "fp32", cpu) == ""
    monkeypatch.setattr("ratiograph.training.memory_plan.available_memory", lambda device: needed - built - 0.001)
    assert "warning" in shortage(task, "fp32", cpu)
    assert f"about {needed:.1f} GB and cpu has {needed - 0.001:.1f} GB left" in shortage(task, "fp32", cpu)
    assert shortage(task, "fp32", cpu, parts=2) == ""


def test_memory_that_does_not_suffice_names_what_takes_less():
    task = built()
    message = r"^memory does not suffice for 64 samples a step \(.*DefaultCPU"
    with pytest.raises(ValueError, match=message) as raised, explained(task, "fp32", 64, 4):
        torch.empty(2**58, dtype=torch.uint8)
    assert "--gin_param=Experiment.accumulation=8" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="shapes"), explained(task, "fp32", 64, 4):
        torch.ones(2, 3) @ torch.ones(2, 3)

"""int8 weights: the kernel against its definition, the engine that samples with them, and the run that corrects for them."""

import math

import pytest
import torch
from test_recipes import arguments, rows_of, task  # noqa: F401 (a fixture)
from tiny_models import FAMILIES, PARAMS, PROMPTS, llama, prompts_of, ready
from torch import nn

from fastalign.algorithms import ALGORITHMS
from fastalign.generation import Engine, SamplingParams
from fastalign.losses.packed import preference_loss
from fastalign.models.adapters import attach_lora
from fastalign.models.backbone import head_of, hidden_states
from fastalign.models.linear import RowLinear, use_row_linears
from fastalign.ops import gemm
from fastalign.ops.backend import load_native, native, use_backend
from fastalign.ops.int8 import Int8Weight, QuantizedWeights, int8_linear, int8_linear_reference, quantize
from fastalign.ops.linear_logp import linear_logp
from fastalign.ops.policy import PolicyOptions
from fastalign.ops.policy_equations import CORRECTIONS
from fastalign.packing import pack
from fastalign.recipes import online
from fastalign.recipes.arguments import OnlineArguments
from fastalign.recipes.flags import build, flag_types, parse
from fastalign.recipes.policy import terms_of

SHAPES = [(1, 1), (3, 7), (4, 16), (5, 17), (61, 49), (172, 64), (173, 131), (64, 48), (896, 100)]  # (K, N)
DTYPES = [torch.float32, torch.bfloat16]
DIGITS = """
def digits(prompts, completions, **columns):
    return [sum(c in "12345" for c in text) / max(len(text), 1) for text in completions]
"""


def poisoned(x: torch.Tensor, packed: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """The kernel's own result in a buffer that was full of NaN."""
    module, _ = load_native()
    assert module is not None
    out = x.new_full((len(x), packed.shape[0]), math.nan)
    module.int8_product(x, packed.words, packed.scale, torch.empty(0) if bias is None else bias, out)
    return out


# --- the product ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_int8_quantize_is_within_half_a_step(width, out, dtype):
    weight = torch.randn(out, width).to(dtype)
    packed = quantize(weight)
    assert packed.integers.shape == weight.shape
    assert packed.integers.abs().amax(1).eq(127).all(), "the largest weight of an output uses the whole range"
    error = (packed.integers.double() * packed.scale.double()[:, None] - weight.double()).abs()
    assert (error <= packed.scale.double()[:, None] * 0.5001).all()
    assert torch.equal(quantize(-weight).integers, -packed.integers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_int8_linear_is_the_fp64_definition(isa, width, out, dtype):
    packed = quantize(torch.randn(out, width))
    for rows in (1, 2, 3, 7, 8, 9, 16, 33, 130, 300):
        x, bias = torch.randn(rows, width).to(dtype), torch.randn(out)
        for given in (None, bias):
            exact = int8_linear_reference(x.double(), packed, given)
            got, plain = poisoned(x, packed, given), int8_linear_reference(x, packed, given)
            error, other = ((value.double() - exact).norm() / exact.norm() for value in (got, plain))
            assert error <= other + 1e-6, "one running sum a result here, several in torch's GEMM"
            assert torch.equal(int8_linear(x, packed, given), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), [(173, 61), (64, 131), (512, 512)])
@pytest.mark.parametrize("threads", [1, 2])
def test_int8_linear_a_row_has_the_same_bits_in_any_batch(isa, width, out, dtype, threads):
    torch.set_num_threads(threads)
    packed, bias = quantize(torch.randn(out, width)), torch.randn(out)
    x = torch.randn(301, width).to(dtype)
    whole = int8_linear(x, packed, bias)
    for rows in (1, 2, 3, 5, 8, 13, 16, 64, 129, 256):
        assert torch.equal(int8_linear(x[7 : 7 + rows], packed, bias), whole[7 : 7 + rows])
    assert torch.equal(int8_linear(torch.cat([x[:1], torch.full_like(x, math.nan)]), packed, bias)[:1], whole[:1])


def test_int8_linear_strides_and_leading_dimensions(backend):
    packed = quantize(torch.randn(48, 64).t())
    x = torch.randn(5, 3, 2, 48)
    for given in (x, x.transpose(0, 1), x[..., 1, :], torch.randn(48, 7).t(), torch.randn(6, 96)[:, 5:53]):
        got = int8_linear(given, packed)
        assert got.shape == (*given.shape[:-1], 64)
        torch.testing.assert_close(got, int8_linear_reference(given, packed), rtol=1e-5, atol=1e-5)


def test_int8_linear_empty(backend):
    packed = quantize(torch.randn(6, 8))
    assert int8_linear(torch.empty(0, 8), packed).shape == (0, 6)
    assert int8_linear(torch.empty(3, 0, 8), packed).shape == (3, 0, 6)
    assert int8_linear(torch.empty(3, 8), quantize(torch.empty(0, 8))).shape == (3, 0)
    bias = torch.randn(6)
    assert torch.equal(int8_linear(torch.empty(3, 0), quantize(torch.empty(6, 0)), bias), bias.expand(3, 6))


def test_int8_linear_zero_and_bad_weights(backend):
    weight = torch.randn(5, 9)
    weight[1], weight[2, 3], weight[3, 0], weight[4] = 0, math.nan, math.inf, 1e-42
    packed, x = quantize(weight), torch.randn(4, 9)
    out = int8_linear(x, packed)
    assert torch.isfinite(out[:, [0, 1, 4]]).all()
    assert (out[:, 1] == 0).all()
    assert out[:, 2:4].isnan().all(), "a weight that is not finite is not hidden"
    assert packed.integers.abs().max() <= 127


def test_int8_wrong_inputs_are_named():
    packed = quantize(torch.randn(6, 8))
    for weight in (torch.randn(3), torch.randn(3, 4).double(), torch.ones(3, 4, device="meta")):
        with pytest.raises(ValueError, match=r"int8: weight: expected float32 or bfloat16 \[N, K\] on the CPU"):
            quantize(weight)
    for x in (torch.randn(3, 7), torch.randn(3, 8).half(), torch.ones(3, 8, device="meta")):
        with pytest.raises(ValueError, match=r"int8_linear: x: expected float32 or bfloat16 \[\.\.\., 8\] on the CPU"):
            int8_linear(x, packed)
    with pytest.raises(ValueError, match=r"int8_linear: bias: expected \[6\], got \[1\]"):
        int8_linear(torch.randn(3, 8), packed, torch.randn(1))


def test_int8_product_checks_what_crosses_the_binding():
    module, _ = load_native()
    if module is None:
        pytest.skip("the native module is not built")
    packed, x, none = quantize(torch.randn(20, 8)), torch.randn(3, 8), torch.empty(0)
    with pytest.raises(ValueError, match=r"words: expected int32 \[2, 2, 16\]"):
        module.int8_product(x, packed.words[:1], packed.scale, none, torch.empty(3, 20))
    with pytest.raises(ValueError, match=r"out: expected float32 \[3, 20\]"):
        module.int8_product(x, packed.words, packed.scale, none, torch.empty(3, 19))
    with pytest.raises(ValueError, match=r"bias: expected float32 \[20\]"):
        module.int8_product(x, packed.words, packed.scale, torch.empty(4), torch.empty(3, 20))


# --- the layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_weights_serve_row_linears_without_a_gradient(dtype):
    model = nn.Sequential(nn.Linear(24, 40)).to(dtype)
    use_row_linears(model)
    layer, x, weights = model[0], torch.randn(5, 24).to(dtype), QuantizedWeights()
    exact = layer(x).detach()
    with weights.active():
        assert torch.equal(layer(x), exact), "a product with a gradient stays exact"
        with torch.no_grad():
            got = layer(x)
            assert torch.equal(got, int8_linear(x, quantize(layer.weight), layer.bias))
            assert not torch.equal(got, exact)
            layer.weight.mul_(2)
            assert torch.equal(layer(x), got), "kept until it is cleared"
            weights.clear()
            assert torch.equal(layer(x), int8_linear(x, quantize(layer.weight), layer.bias))
    with torch.no_grad(), gemm.packed_weights():
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


# --- the engine -----------------------------------------------------------------------------------------------------------


def scored(model, rollout):
    packed, head = pack(rollout.trees()), head_of(model)
    hidden = hidden_states(model, packed)[packed.rows]
    scale = head.temperature(1.0)
    return linear_logp(hidden, head.weight, packed.targets, bias=head.bias, temperature=scale, logit_softcap=head.logit_softcap).detach()


def everything(rollout):
    return [[(s.ids, s.logprobs, s.raw_logprobs, s.kept_mass, s.finish_reason) for s in group] for group in rollout.samples]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_engine_differs_a_little_from_the_trainer(family, dtype):
    built = ready(FAMILIES[family]().to(dtype))
    rollout = Engine(built, quantization="int8").rollout(prompts_of(4, 19, 40), SamplingParams(n=3, max_tokens=24, seed=3))
    gap = (scored(built, rollout) - torch.tensor([v for s in rollout.flat for v in s.logprobs])).abs()
    assert 0 < gap.mean() < 0.3, "weights of deviation 0.2: a hundred times those of a trained model, so errors are, too"
    assert gap.max() < 3


def test_quantized_engine_bits_do_not_depend_on_the_schedule():
    if native() is None:
        pytest.skip("the reference sums in an order that depends on the batch")
    model = ready(llama())
    plain = everything(Engine(model, quantization="int8").rollout(PROMPTS, PARAMS))
    for options in (
        {"block_size": 4},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 16},
        {"kv_cache_tokens": 64, "block_size": 4},
    ):
        assert everything(Engine(model, quantization="int8", **options).rollout(PROMPTS, PARAMS)) == plain
    alone = [Engine(model, quantization="int8").rollout([p], PARAMS, request_ids=[i]) for i, p in enumerate(PROMPTS)]
    assert [everything(one)[0] for one in alone] == plain
    assert everything(Engine(model).rollout(PROMPTS, PARAMS)) != plain


def test_quantized_engine_repacks_after_an_update():
    model = ready(llama())
    engine = Engine(model, quantization="int8")
    before = everything(engine.rollout(PROMPTS, PARAMS))
    assert everything(engine.rollout(PROMPTS, PARAMS)) == before
    with engine.updating_weights(), torch.no_grad():
        for module in model.modules():
            if isinstance(module, RowLinear):
                module.weight += 0.1 * torch.randn_like(module.weight)
    after = everything(engine.rollout(PROMPTS, PARAMS))
    assert after != before
    assert after == everything(Engine(model, quantization="int8").rollout(PROMPTS, PARAMS))


def test_quantized_engine_leaves_the_weights_and_the_head_alone():
    model = ready(llama())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    original = QuantizedWeights.linear

    def watched(self, x, weight, bias=None):
        seen.append(weight)
        return original(self, x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedWeights, "linear", watched)
        Engine(model, quantization="int8").rollout(PROMPTS, PARAMS)
    layers = [m.weight for m in model.modules() if isinstance(m, RowLinear) and m is not model.get_output_embeddings()]
    assert {id(weight) for weight in seen} == {id(weight) for weight in layers}
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_quantized_engine_with_an_adapter():
    pytest.importorskip("peft")
    model = attach_lora(ready(llama()), r=2, alpha=4).eval()
    rollout = Engine(model, quantization="int8").rollout(PROMPTS, PARAMS)
    assert all(math.isfinite(v) for s in rollout.flat for v in s.logprobs)


def test_quantized_engine_refuses_what_it_cannot_do():
    model = ready(llama())
    with pytest.raises(ValueError, match=r"unknown quantization in8; did you mean int8"):
        Engine(model, quantization="in8")
    with pytest.raises(ValueError, match=r"float32 and bfloat16 weights on the CPU, got torch.float64"):
        Engine(ready(llama().double()), quantization="int8")
    with pytest.raises(ValueError, match=r"on the CPU, got torch.float32 on meta"):
        Engine(model.to("meta"), quantization="int8")


# --- the run --------------------------------------------------------------------------------------------------------------


def test_grpo_with_int8_rollouts_reports_and_corrects_the_difference(task, tmp_path):  # noqa: F811
    flags = {"optim": {"max_steps": 6, "learning_rate": 3e-3}, "online": {"rollout_quantization": "int8", "num_generations": 8}}
    online.run(arguments(task, tmp_path / "int8", "grpo", **flags))
    rows = [row for row in rows_of(tmp_path / "int8") if "loss" in row]
    trained = [row for row in rows if row.get("sampling/sampling_logp_difference/max", 0) > 0]
    assert trained
    for row in trained:
        assert 1e-6 < row["sampling/sampling_logp_difference/mean"] < 0.2
        assert row["sampling/sampling_logp_difference/max"] >= row["sampling/sampling_logp_difference/mean"]
        assert 0.8 < row["sampling/importance_sampling_ratio/mean"] < 1.2
        assert 0 <= row["sampling/importance_sampling_ratio/clipped"] <= 1
    assert all(math.isfinite(row["loss"]) for row in trained)


def test_grpo_with_int8_rollouts_clips_where_it_is_told(task, tmp_path):  # noqa: F811
    """A cut below every ratio takes every token; a mask that leaves none takes every gradient."""
    flags = {"rollout_quantization": "int8", "importance_correction_high": 1e-3}
    online.run(arguments(task, tmp_path / "cut", "grpo", optim={"max_steps": 2}, online=flags))
    rows = [row for row in rows_of(tmp_path / "cut") if "loss" in row and row.get("grad_norm")]
    clipped = [row["sampling/importance_sampling_ratio/clipped"] for row in rows]
    assert clipped
    assert min(clipped) == 1
    masked = {"rollout_quantization": "int8", "importance_correction": "mask", "importance_correction_high": 1e-3}
    masked |= {"importance_correction_low": 1e-4, "beta": 0.0}
    online.run(arguments(task, tmp_path / "mask", "grpo", optim={"max_steps": 2}, online=masked))
    rows = [row for row in rows_of(tmp_path / "mask") if "loss" in row]
    assert max(row["grad_norm"] for row in rows) == 0


def test_int8_rollouts_are_evaluated_with_the_weights_themselves(task, tmp_path):  # noqa: F811
    """Before the first step the held-out reward is the unquantized model's, digit for digit."""
    for name, online_flags in (("exact", {}), ("int8", {"rollout_quantization": "int8"})):
        online.run(arguments(task, tmp_path / name, "grpo", optim={"max_steps": 1}, online=online_flags))
    first = [rows_of(tmp_path / name)[0] for name in ("exact", "int8")]
    keys = [key for key in first[0] if key.startswith("eval/")]
    assert keys
    assert [first[0][key] for key in keys] == [first[1][key] for key in keys]


def test_int8_rollouts_learn_what_exact_ones_learn(task, tmp_path):  # noqa: F811
    """A dense reward (the share of low digits) rises as far as with exact rollouts; a sparse one rises with neither in so few steps."""
    (task / "digits.py").write_text(DIGITS)
    last = {}
    for name in ("none", "int8"):
        flags = {"rollout_quantization": name, "num_generations": 8, "beta": 0.0, "reward": [f"{task / 'digits.py'}:digits"]}
        changes = {"optim": {"max_steps": 10, "learning_rate": 3e-3}, "batch": {"per_device_train_batch_size": 32}, "run": {"seed": 1}}
        online.run(arguments(task, tmp_path / name, "grpo", online=flags, **changes))
        rewards = [row["reward"] for row in rows_of(tmp_path / name) if "reward" in row]
        last[name] = sum(rewards[-3:]) / 3
        assert last[name] > rewards[0] + 0.15
    assert abs(last["int8"] - last["none"]) < 0.05


# --- the flags ------------------------------------------------------------------------------------------------------------


def algorithm(**flags):
    return online.algorithm_of(build("grpo", flags))


def test_correction_flags_default_to_truncation_of_quantized_rollouts():
    assert algorithm().correction_options == {}
    assert algorithm(rollout_quantization="int8").correction_options == {"correction": "truncate"}
    assert algorithm(rollout_quantization="int8", importance_correction="none").correction_options["correction"] == "none"
    chosen = algorithm(importance_correction="mask", importance_correction_low=0.25, importance_correction_high=5.0, entropy_coef=0.01)
    assert chosen.correction_options == {"correction": "mask", "correction_low": 0.25, "correction_high": 5.0}
    assert chosen.entropy_coef == 0.01
    assert all(not row.correction_options for row in ALGORITHMS.values())


def test_correction_flags_name_every_row_of_the_op():
    assert flag_types("grpo")["importance_correction"].__args__ == ("auto", *CORRECTIONS)
    for name in CORRECTIONS:
        assert terms_of(algorithm(importance_correction=name)).correction == name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"importance_correction_high": 3.0}, "--importance_correction_high 3: the importance correction 'none' has no such bound"),
        ({"rollout_quantization": "int8", "importance_correction_low": 0.1}, "correction 'truncate' has no such bound; give .* mask"),
        ({"importance_correction": "mask", "importance_correction_low": 3.0}, "0 <= correction_low <= correction_high, got 3.0, 2.0"),
    ],
)
def test_correction_flags_that_do_nothing_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        algorithm(**flags)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["kl_coef", "entropy_coef", "correction_low", "correction_high"])
def test_policy_options_that_are_not_finite_are_named(name, value):
    with pytest.raises(ValueError, match=f"PolicyOptions: {name}: expected a finite number, got {value}"):
        PolicyOptions(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_preference_options_that_are_not_finite_are_named(value):
    with pytest.raises(ValueError, match=f"beta must be finite, got {value}"):
        preference_loss(torch.randn(4), torch.tensor([0, 2, 4]), loss="simpo", options={"beta": value})


def test_rollout_flags_are_parsed_like_the_others():
    values = parse("grpo", ["--rollout-quantization", "int8", "--importance_correction", "sequence_mask", "--entropy_coef", "0.01"])
    assert values == {"rollout_quantization": "int8", "importance_correction": "sequence_mask", "entropy_coef": 0.01}
    with pytest.raises(ValueError, match="--rollout_quantization: unknown int4; did you mean int8"):
        parse("grpo", ["--rollout_quantization", "int4"])
    with pytest.raises(ValueError, match="--importance_correction: unknown truncated; did you mean"):
        parse("grpo", ["--importance_correction", "truncated"])
    with pytest.raises(ValueError, match="--importance_correction_high must be >= 0"):
        parse("grpo", ["--importance_correction_high", "-1"])
    assert OnlineArguments().rollout_quantization == "none"


def test_int8_rollouts_without_a_correction_are_announced(task, tmp_path, caplog):  # noqa: F811
    flags = {"rollout_quantization": "int8", "importance_correction": "none"}
    online.run(arguments(task, tmp_path, "grpo", optim={"max_steps": 1}, online=flags))
    assert "--importance_correction none weighs their tokens" in caplog.text
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert not any("sampling/importance_sampling_ratio/mean" in row for row in rows)


def test_int8_reference_backend_serves_the_engine():
    with use_backend("reference"):
        rollout = Engine(ready(llama()), quantization="int8").rollout(PROMPTS[:2], SamplingParams(max_tokens=4))
    assert all(len(sample.ids) == 4 or sample.finish_reason == "stop" for sample in rollout.flat)

"""AViT as published: its block against einsum, its weights from a file, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from physrep.models.avit import AViT
from physrep.models.elsewhere import MPP_FIELDS, field_columns, load_avit
from physrep.models.pretrained import load_encoder, save_encoder
from physrep.physics.systems import SYSTEMS
from physrep.probing.evaluate import own_encoder
from physrep.probing.sharing import BUILDERS
from physrep.training.run import resolve

DIM, HEADS, DEPTH = 16, 2, 2
SHEAR = ["tracer", "pressure", "velocity_x", "velocity_y"]


def published(columns: int = 12) -> dict[str, torch.Tensor]:
    "Names and shapes as MPP's program writes them, with its decoder."
    q, head, vector = DIM // 4, (DIM // HEADS,), ("weight", "bias")
    shapes = {"space_bag.weight": (q, columns), "space_bag.bias": (q,)}
    shapes |= {"debed.out_kernel": (q, columns, 4, 4), "debed.out_bias": (columns,)}
    for i, (width, size) in enumerate(((q, 4), (q, 2), (DIM, 2))):
        shapes |= {f"embed.in_proj.{3 * i}.weight": (width, q, size, size)}
        shapes |= {f"embed.in_proj.{3 * i + 1}.{kind}": (width,) for kind in vector}
    for i in range(DEPTH):
        for part, norms, gammas in (
            ("temporal", ("norm1", "norm2"), ("gamma",)),
            ("spatial", ("norm1", "norm2", "mlp_norm"), ("gamma_att", "gamma_mlp")),
        ):
            own = {f"{norm}.{kind}": (DIM,) for norm in norms for kind in vector} | dict.fromkeys(gammas, (DIM,))
            own |= {f"{norm}.{kind}": head for norm in ("qnorm", "knorm") for kind in vector}
            own |= {"input_head.weight": (3 * DIM, DIM, 1, 1), "output_head.weight": (DIM, DIM, 1, 1)}
            own |= {"input_head.bias": (3 * DIM,), "output_head.bias": (DIM,)}
            own |= {"rel_pos_bias.relative_attention_bias.weight": (32, HEADS)}
            shapes |= {f"blocks.{i}.{part}.{name}": shape for name, shape in own.items()}
        mlp = {"fc1.weight": (4 * DIM, DIM), "fc1.bias": (4 * DIM,), "fc2.weight": (DIM, 4 * DIM), "fc2.bias": (DIM,)}
        shapes |= {f"blocks.{i}.spatial.mlp.{name}": shape for name, shape in mlp.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    "x (t, h, w, d)"
    return x / x.std(dim=(1, 2), keepdim=True) * weight


def instance(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    y = (x - x.mean((1, 2), keepdim=True)) / (x.var((1, 2), keepdim=True, correction=0) + 1e-5).sqrt()
    return y * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(x: torch.Tensor, state: dict, name: str, axis: str, wraps: bool = False) -> torch.Tensor:
    "One axis of tokens (t, h, w, d): scores by einsum, biases by a loop over pairs."
    x = torch.einsum("thwd,ed->thwe", x, state[f"{name}.input_head.weight"][:, :, 0, 0])
    q, k, v = (x + state[f"{name}.input_head.bias"]).unflatten(-1, (HEADS, 3, DIM // HEADS)).unbind(-2)
    norms = ((state[f"{name}.{which}.weight"], state[f"{name}.{which}.bias"]) for which in ("qnorm", "knorm"))
    q, k = (F.layer_norm(y, y.shape[-1:], *norm) for y, norm in zip((q, k), norms))
    n = x.shape["thw".index(axis)]
    table = state[f"{name}.rel_pos_bias.relative_attention_bias.weight"]
    bias = torch.zeros(n, n, HEADS)
    for i in range(n):
        for j in range(n):
            distance = j - i
            if wraps and abs(distance) > n / 2:
                distance += n if distance < 0 else -n
            assert abs(distance) < 8, "each distance has a row of its own"
            bias[i, j] = table[abs(distance) + 16 * (distance > 0)]
    pair = {"t": "ihwad,jhwad->hwija", "h": "tiwad,tjwad->twija", "w": "thiad,thjad->thija"}[axis]
    mixed = {"t": "hwija,jhwad->ihwad", "h": "twija,tjwad->tiwad", "w": "thija,thjad->thiad"}[axis]
    weights = (torch.einsum(pair, q, k) / (DIM // HEADS) ** 0.5 + bias).softmax(-2)
    return torch.einsum(mixed, weights, v).flatten(-2)


def linear(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])


def run_block(x: torch.Tensor, state: dict, i: int, periodic: tuple[bool, bool]) -> torch.Tensor:
    "The published block on the tokens (t, h, w, d) of one clip."
    t, s = f"blocks.{i}.temporal", f"blocks.{i}.spatial"
    y = instance(attention(instance(x, state, f"{t}.norm1"), state, t, "t"), state, f"{t}.norm2")
    x = x + state[f"{t}.gamma"] * linear(y, state, f"{t}.output_head")
    z = rms(x, state[f"{s}.norm1.weight"])
    y = (attention(z, state, s, "w", periodic[1]) + attention(z, state, s, "h", periodic[0])) / 2
    x = x + state[f"{s}.gamma_att"] * linear(rms(y, state[f"{s}.norm2.weight"]), state, f"{s}.output_head")
    y = linear(F.gelu(linear(x, state, f"{s}.mlp.fc1")), state, f"{s}.mlp.fc2")
    return x + state[f"{s}.gamma_mlp"] * rms(y, state[f"{s}.mlp_norm.weight"])


@pytest.mark.parametrize("periodic", [(False, False), (True, False), (True, True)])
def test_avit_computes_what_the_published_layers_compute(tmp_path, periodic):
    state = published()
    torch.save({"model_state": {f"module.{n}": v for n, v in state.items()}, "epoch": 3}, tmp_path / "ckpt.tar")
    encoder = load_avit(tmp_path / "ckpt.tar", SHEAR, periodic=periodic)
    x = 3 + 2 * torch.randn(2, 4, 3, 64, 80, generator=torch.Generator().manual_seed(1))
    expected = []
    for clip in x:
        y = (clip - clip.mean((1, 2, 3), keepdim=True)) / clip.std((1, 2, 3), keepdim=True)
        y = torch.einsum("cthw,dc->tdhw", y, state["space_bag.weight"][:, [3, 9, 1, 2]])
        y = 3**0.5 * (y + state["space_bag.bias"][:, None, None])
        for i, size in enumerate((4, 2, 2)):
            y = F.conv2d(F.gelu(y) if i else y, state[f"embed.in_proj.{3 * i}.weight"], stride=size)
            y = rms(y.movedim(1, -1), state[f"embed.in_proj.{3 * i + 1}.weight"]).movedim(-1, 1)
        y = y.movedim(1, -1)
        for i in range(DEPTH):
            y = run_block(y, state, i, periodic)
        expected.append(y.flatten(0, 2))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), torch.stack(expected), rtol=1e-4, atol=1e-4)
        last = load_avit(tmp_path / "ckpt.tar", SHEAR, periodic=periodic, last_step=True)
        torch.testing.assert_close(last(x), torch.stack(expected)[:, -20:], rtol=1e-4, atol=1e-4)
        assert last.grid((3, 64, 80)) == (1, 4, 5)


def test_the_order_of_the_channels_does_not_matter(tmp_path):
    torch.save(published(), tmp_path / "a.pth")
    x = torch.randn(1, 4, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    names = ["buoyancy", "pressure", "velocity_x", "speed"]
    order = [3, 1, 0, 2]
    first = load_avit(tmp_path / "a.pth", names)
    second = load_avit(tmp_path / "a.pth", [names[i] for i in order])
    other = load_avit(tmp_path / "a.pth", names, seed=1)
    new = first.embed.weight[:, 12:]
    with torch.no_grad():
        torch.testing.assert_close(first(x), second(x[:, order]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(other(x), first(x), atol=1e-2)
        assert torch.equal(new, second.embed.weight[:, [13, 12]]) and new.abs().max() <= 14**-0.5


def test_it_is_an_encoder_of_this_package(tmp_path):
    "Saved and loaded, with the axes of its system, and probed as an encoder of one's own."
    torch.save(published(), tmp_path / "a.pth")
    encoder = load_avit(tmp_path / "a.pth", system="rayleigh_benard", statistics=True)
    assert encoder.periodic == (True, False) and encoder.config["columns"] == [12, 9, 1, 2]
    assert load_avit(tmp_path / "a.pth", system="rayleigh_benard", periodic=(False, False)).periodic == (False, False)
    x = torch.randn(2, 4, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    facts = dict(system="rayleigh_benard", mean=torch.zeros(4), std=torch.ones(4), shape=(2, 32, 32), dt=0.2)
    save_encoder(tmp_path / "encoder.safetensors", encoder, "physrep.models.avit:AViT", **facts)
    assert "physrep.models.avit:AViT" in BUILDERS, "so that the Hub's files need no code of others"
    reader = {"path": str(tmp_path / "a.pth"), "statistics": True}
    run = resolve("rayleigh_benard", "frozen", "physrep.models.elsewhere:load_avit", "smoke", encoder_config=reader)
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "encoder.safetensors")(x), encoder(x))
        assert torch.equal(own_encoder(run)(x), encoder(x))


def test_fields_are_found_by_name():
    assert field_columns(MPP_FIELDS) == (list(range(10)), [])
    assert field_columns(["compNS.Vx", "h", 10]) == ([6, 0, 10], [])
    assert field_columns(SYSTEMS["shear_flow"].channels) == ([3, 9, 1, 2], [])
    columns, new = field_columns(SYSTEMS["active_matter"].channels)
    assert columns[:3] == [12, 1, 2] and new[0] == "concentration" and columns[3:] == list(range(13, 21))


def test_what_does_not_fit_is_refused(tmp_path):
    state = published()
    del state["blocks.0.temporal.gamma"], state["embed.in_proj.4.bias"]
    torch.save(state | {"head.weight": torch.zeros(2, 16)}, tmp_path / "broken.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    torch.save(published(columns=4), tmp_path / "four.pth")
    small = {"dim": 16, "depth": 1, "heads": 2}
    for attempt, words in (
        (lambda: load_avit(tmp_path / "broken.pth", SHEAR), "2 missing: .*temporal.gamma.*1 unexpected: head.weight"),
        (lambda: load_avit(tmp_path / "other.pth", ["buoyancy"]), r"other.pth does not fit. \d+ missing"),
        (lambda: load_avit(tmp_path / "four.pth", SHEAR), r"columns 0 to 3 of fields, and none for pressure \(9\)"),
        (lambda: field_columns(["Vx"]), "field 'Vx' could be incompNS.Vx or compNS.Vx; name the set, too"),
        (lambda: field_columns(["swe.Vx"]), "MPP has no field 'swe.Vx'; it has swe.h, incompNS.Vx"),
        (lambda: field_columns(["h", 12]), r"columns 0 to 11 of fields, and none for 12 \(12\)"),
        (lambda: field_columns(["tracer", "particles"]), "every field needs a column of its own"),
        (lambda: field_columns(["speed", "speed"]), "every field needs a column of its own"),
        (lambda: AViT(2, columns=[1], **small), r"columns must name one for each of 2 channels, got \[1\]"),
        (lambda: AViT(2, columns=[1, 12], **small), "a column of its own from 0 to 11"),
        (lambda: AViT(2, normalise="set", statistics=True, **small), "statistics hands back"),
        (lambda: AViT(2, **small)(torch.zeros(1, 2, 2, 16, 16)), "need two patches of 16x16"),
    ):
        with pytest.raises(ValueError, match=words):
            attempt()

"""Rings of ranks: losses and gradients of tiny models against one process; argv is a folder and sizes."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]
import forked  # noqa: E402

from training.longcontext import ring as rings  # noqa: E402
from training.longcontext.errors import Unsupported  # noqa: E402

VOCAB = 61
BASE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2}
FAMILIES = {
    "llama": {"num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 64},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0,
             "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


def model_of(family, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "initializer_range": 0.2} if family == "gpt2" else BASE
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(settings | FAMILIES.get(family, {}) | more))).train()


def window(tokens, batch=2):
    """Ids and labels; the first third has none, so ranks differ in targets."""
    ids = torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    labels = ids.clone()
    labels[:, :tokens // 3] = -100
    return ids, labels


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                      for p in model.parameters()])


def by_one(model, ids, labels):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return float(loss.detach()), gradients(model, loss)


def by_ring(model, mount, ring, ids, labels):
    part = rings.shared(ids, labels, ring.rank, ring.size)
    mount.on()
    with ring.sharing():
        logits = model(input_ids=part.ids, position_ids=part.positions, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="sum")
    found = gradients(model, loss)  # a recomputation calls the ring again
    mount.off()
    total = loss.detach()
    for value in (total, found):
        dist.all_reduce(value, group=ring.group)
    return float(total), found


def compared(ring, family, tokens, checkpointed):
    """(loss by one, by the ring, worst gradient difference relative to the largest, attention calls)"""
    model, (ids, labels) = model_of(family), window(tokens)
    expected = by_one(model, ids, labels)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mount, before = rings.Mount(model), ring.calls
    found = by_ring(model, mount, ring, ids, labels)
    again = by_one(model, ids, labels)
    assert again[0] == expected[0]
    assert torch.equal(again[1], expected[1]), "the model's own attention did not come back"
    worst = (found[1] - expected[1]).abs().max() / expected[1].abs().max()
    return [expected[0], found[0], float(worst), ring.calls - before]


def refused(ring, family, **more):
    """What the ring says to a model, or nothing; the two losses of its own comparison."""
    model = model_of(family, **more)
    try:
        return list(rings.Mount(model).verify(model, ring))
    except Unsupported as error:
        return str(error)


def counted(ring):
    """Numbers that this rank sends in one layer's attention, forward and backward."""
    sent, exchange = [], ring.pass_on
    ring.pass_on = lambda tensor, tag: (sent.append(tensor.numel()), exchange(tensor, tag))[1]
    q, k, v = (torch.randn(1, heads, 8, 4, requires_grad=True) for heads in (4, 2, 2))
    out = ring.attention(torch.nn.Module(), q, k, v, torch.empty(1, 1, 1, 0).as_subclass(rings._None))[0]
    forward = sum(sent)
    out.sum().backward()
    del ring.pass_on
    return [forward, sum(sent) - forward, k.numel() + v.numel()]


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, found = dist.get_world_size(), {}
    ring = rings.Ring(world, longest=60)
    for family in FAMILIES:
        for tokens, checkpointed in ((48, False), (41, True)):
            found[f"{family} {tokens}"] = compared(ring, family, tokens, checkpointed)
    found["short"] = compared(ring, "llama", 2, False)
    found["sent"] = counted(ring)
    found["verified"] = refused(ring, "qwen2")
    found["window"] = refused(ring, "mistral", sliding_window=16)
    found["rope"] = refused(ring, "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                                            "rope_theta": 1e4})
    found["lied"] = lied(ring)
    found["softcap"] = refused(ring, "gemma2", head_dim=8, sliding_window=64, num_key_value_heads=2)
    found["alone"] = alone(ring)
    if dist.get_rank() == 0:
        Path(folder, f"found-{world}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def lied(ring):
    """A model whose positions do not reach its layers gives another loss."""
    model = model_of("llama")
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: own(
        x, torch.arange(position_ids.shape[1])[None])
    try:
        return list(rings.Mount(model).verify(model, ring))
    except Unsupported as error:
        return str(error)


def alone(ring):
    """The ring's attention outside of a shared step, as when one rank evaluates."""
    model, (ids, _) = model_of("llama"), window(16)
    mount = rings.Mount(model)
    mount.on()
    try:
        model(input_ids=ids)
    except RuntimeError as error:
        return str(error)


if __name__ == "__main__":
    for size in sys.argv[2:]:
        forked.run(int(size), main, sys.argv[1])

import time, torch, cProfile, pstats, io, sys
import torch.distributed as dist
from torch.nn import Parameter
from moe_runtime.optim.adamw import AdamW
from moe_runtime.parallel.zero import ZeroOptimizer


def f(rank, world, stage, scale, n):
    g = dist.group.WORLD
    ed = g
    if world > 1:
        for r in range(2):
            x = dist.new_group([i for i in range(world) if i % 2 == r])
            if rank % 2 == r:
                ed = x
    named = []
    for i in range(n):
        p = Parameter(torch.ones(*((64 * scale, 64 * scale) if i % 3 else (64 * scale,))).bfloat16())
        if i % 5 == 0 and p.dim() > 1:
            p.is_expert = True
        named.append((f"p{i}", p))
    ex = lambda p: getattr(p, "is_expert", False)
    groups = [
        dict(name="dense", params=[p for _, p in named if p.dim() > 1 and not ex(p)], weight_decay=0.1),
        dict(name="nodecay", params=[p for _, p in named if p.dim() == 1], weight_decay=0.0),
        dict(name="experts", params=[p for _, p in named if ex(p)], weight_decay=0.1),
    ]
    single = dist.new_group([rank], use_local_synchronization=True)
    t = time.perf_counter()
    z = ZeroOptimizer(
        named,
        groups=groups,
        make_optimizer=lambda gs: AdamW(gs, moments="bf16"),
        dp_group=g,
        expert_dp_group=ed,
        ep_group=ed,
        norm_group=single,
        stage=stage,
        grad_clip=1.0,
    )
    build = time.perf_counter() - t
    t = time.perf_counter()
    ZeroOptimizer(
        named,
        groups=groups,
        make_optimizer=lambda gs: AdamW(gs, moments="bf16"),
        dp_group=g,
        expert_dp_group=ed,
        ep_group=ed,
        norm_group=single,
        stage=stage,
        grad_clip=1.0,
    ) if False else None
    out = {"build_ms": build * 1e3, "elements": sum(p.numel() for _, p in named)}

    def fill():
        for _, p in named:
            if p.grad_accum is None:
                p.grad_accum = torch.zeros_like(p, dtype=torch.float32)
            p.grad_accum += 1e-3
        z.end_microbatch()

    for _ in range(3):
        fill()
        z.step(1e-4)
    ts, tr, cpu = [], [], []
    pr = cProfile.Profile()
    for k in range(10):
        t0 = time.perf_counter()
        fill()
        t1 = time.perf_counter()
        c = time.process_time()
        z.reduce()
        t2 = time.perf_counter()
        z.step(1e-4)
        t3 = time.perf_counter()
        ts.append(t3 - t2)
        tr.append(t2 - t1)
        cpu.append(time.process_time() - c)
    for k in range(5):
        fill()
        pr.enable()
        z.step(1e-4)
        pr.disable()
    s = io.StringIO()
    pstats.Stats(pr, stream=s).sort_stats("tottime").print_stats(25)
    med = lambda x: sorted(x)[len(x) // 2] * 1e3
    out |= {
        "reduce_ms": med(tr),
        "step_ms": med(ts),
        "min_reduce": min(tr) * 1e3,
        "min_step": min(ts) * 1e3,
        "cpu_ms": med(cpu),
    }
    return out, s.getvalue()


if __name__ == "__main__":
    from tests.ranks import run_ranks

    for w, stage, scale in ((4, 1, 1), (4, 1, 4), (4, 1, 8)):
        r = run_ranks(f, w, stage, scale, 100)
        print(w, stage, {k: round(v, 1) for k, v in r[0][0].items()})
        if scale == 1 and stage == 1 and len(sys.argv) > 1:
            print(r[0][1][:5000])

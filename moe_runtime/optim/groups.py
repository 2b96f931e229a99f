"""Parameter groups."""
def parameter_groups(named_params, weight_decay, expert_group_name):
    groups = []
    for is_expert in (False, True):
        for decays in (True, False):
            ps = [p for _, p in named_params if getattr(p, "is_expert", False) == is_expert and (p.ndim > 1) == decays]
            if ps:
                g = {"params": ps, "weight_decay": weight_decay if decays else 0.0, "moe": is_expert,
                     "name": (expert_group_name if is_expert else "dense") + ("" if decays else "_nd")}
                groups.append(g)
    return groups

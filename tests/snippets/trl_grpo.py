"""真实调用 TRL 的 GRPO 损失：`GRPOTrainer._compute_loss` 是 TRL 自己的代码，只把模型前向换成给定的对数概率。"""

from collections import defaultdict
from types import SimpleNamespace

import torch


def trl_grpo_loss(
    log_probs,
    old_log_probs,
    advantages,
    loss_mask,
    *,
    ref_log_probs=None,
    num_items=None,
    accumulation=1,
    delta=None,
    bias_correction_kl=False,
    importance_sampling_ratio=None,
    **settings,
):
    """返回（标量损失, 对 log_probs 的梯度, 记录的指标）。

    settings 覆盖训练器的属性，如 loss_type、beta、epsilon_low、max_completion_length、importance_sampling_level。
    给了 importance_sampling_ratio，就打开 vLLM 的训推不一致修正。没有写的属性一律不存在：TRL 若读了别的，测试报错而不是悄悄用了某个值。
    """
    from trl.trainer.grpo_trainer import GRPOTrainer

    leaf = log_probs.clone().requires_grad_()
    mask = loss_mask.long()
    attributes = {
        "_get_per_token_logps_and_entropies": lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": importance_sampling_ratio is not None,
        "vllm_importance_sampling_correction": True,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": accumulation,
        "args": SimpleNamespace(
            delta=delta, steps_per_generation=accumulation, use_bias_correction_kl=bias_correction_kl
        ),
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        "_metrics": {"train": defaultdict(list)},
    }
    trainer = SimpleNamespace(**attributes | settings)
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old_log_probs,
        "ref_per_token_logps": ref_log_probs,
        "num_items_in_batch": mask.sum() if num_items is None else torch.tensor(num_items),
        "importance_sampling_ratio": importance_sampling_ratio,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], trainer._metrics["train"]

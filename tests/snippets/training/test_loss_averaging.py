"""loss 平均的真值来自与参考实现无关的东西：手算的小例子、PyTorch 对一个大 batch 的自动求导、
transformers 5.23.0 的 `ForCausalLMLoss` / `fixed_cross_entropy` 与真实运行的 `Trainer`、
真实的两进程 gloo DistributedDataParallel。错误写法定义在本文件末尾，断言它们被同一个真值拒绝。
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

from snippets.training.loss_averaging import (
    accumulate_gradients,
    count_valid_labels,
    global_sequence_mean_loss,
    global_token_mean_loss,
    naive_mean_of_means_loss,
    token_cross_entropy,
)

V, C = 11, 6
ROOT = Path(__file__).parents[3]
# LENGTHS[w][m]：第 w 张卡第 m 个微批里各条序列的目标 token 数
LENGTHS = [[[9, 4], [2, 7, 3]], [[1], [5, 5]]]
W, M = 2, 2


def make_model(dtype=torch.float64):
    """逐 token 的小模型：不同序列互不影响，放在哪个微批都一样。"""
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(V, C), nn.Tanh(), nn.Linear(C, V)).to(dtype)


def make_sequences(lengths=LENGTHS, seed=2):
    """sequences[w][m][b]，每条 (n + 1,) 个 token；第一个 token 不是目标。"""
    g = torch.Generator().manual_seed(seed)
    return [[[torch.randint(V, (n + 1,), generator=g) for n in micro] for micro in rank] for rank in lengths]


def collate(sequences):
    """右侧补齐：输入补 0，标签补 -100。"""
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=0)
    labels = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-100)
    return ids, labels


def flat_grad(model):
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return grad


def big_batch(model, sequences):
    """真值：逐条序列、逐个 token 求 -log p，全部相加后除以总数，再自动求导。不补齐、不移位整批。"""
    terms = []
    for s in sequences:
        log_probs = model(s[:-1]).log_softmax(-1)
        terms.append(-log_probs[torch.arange(len(s) - 1), s[1:]])
    loss = torch.cat(terms).sum() / sum(len(s) - 1 for s in sequences)
    loss.backward()
    return loss.detach(), flat_grad(model)


def flatten(sequences):
    return [s for rank in sequences for micro in rank for s in micro]


def reduce_over_ranks(model, sequences, loss_fn):
    """DDP 的语义：每张卡累加自己的微批，再对各卡求平均。返回 loss 与梯度。"""
    losses, grads = [], []
    for rank in sequences:
        for micro in rank:
            ids, labels = collate(micro)
            loss = loss_fn(model(ids), labels)
            loss.backward()
            losses.append(loss.detach())
        grads.append(flat_grad(model))
    return torch.stack(losses).sum() / len(sequences), torch.stack(grads).mean(0)


def total_valid(sequences):
    return sum(int(count_valid_labels(collate(micro)[1])) for rank in sequences for micro in rank)


# ---------------------------------------------------------------- 手算


def test_token_cross_entropy_shifts_and_ignores_by_hand():
    """V=2，logits 为 (0, log 3)：p = (1/4, 3/4)。

    标签 (0, 1, -100, 0)：位置 1 预测 1，-log(3/4)；位置 2 的目标被忽略，0；位置 3 预测 0，-log(1/4)。
    第一个标签 0 不是任何位置的目标。
    """
    logits = torch.tensor([0.0, math.log(3.0)]).expand(1, 4, 2)
    labels = torch.tensor([[0, 1, -100, 0]])
    expected = torch.tensor([[math.log(4 / 3), 0.0, math.log(4.0)]])
    torch.testing.assert_close(token_cross_entropy(logits, labels), expected)
    assert count_valid_labels(labels) == 2


def test_mean_of_means_and_global_mean_by_hand():
    """两个微批：A 有 3 个 token，loss 各 log 4；B 有 1 个 token，loss 为 log(4/3)。

    均值的均值 = (log 4 + log(4/3)) / 2；全局平均 = (3 log 4 + log(4/3)) / 4。
    """
    row = torch.tensor([0.0, math.log(3.0)])
    a_logits, a_labels = row.expand(1, 4, 2), torch.tensor([[1, 0, 0, 0]])
    b_logits, b_labels = row.expand(1, 2, 2), torch.tensor([[0, 1]])
    naive = sum(
        naive_mean_of_means_loss(z, y, grad_accum_steps=2)
        for z, y in [(a_logits, a_labels), (b_logits, b_labels)]
    )
    correct = sum(
        global_token_mean_loss(z, y, num_items_in_batch=4)
        for z, y in [(a_logits, a_labels), (b_logits, b_labels)]
    )
    torch.testing.assert_close(naive, torch.tensor((math.log(4) + math.log(4 / 3)) / 2))
    torch.testing.assert_close(correct, torch.tensor((3 * math.log(4) + math.log(4 / 3)) / 4))


def test_token_weights_by_hand():
    """logits 的梯度 = 权重 × (softmax − onehot)；对 W=2 张卡求平均要再除以 2。

    N=4、M=2：朴素权重 1/(W·M·N) = 1/16；全局共 19 个 token：正确权重 1/19。
    """
    ids, labels = collate([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6])])  # N = 4
    logits = torch.zeros(2, 4, V, dtype=torch.float64, requires_grad=True)
    naive_mean_of_means_loss(logits, labels, grad_accum_steps=2).backward()
    at_target = logits.grad[0, 0, 2] / (1 / V - 1)
    torch.testing.assert_close(at_target / 2, torch.tensor(1 / 16, dtype=torch.float64))
    logits.grad = None
    global_token_mean_loss(logits, labels, num_items_in_batch=19, dp_size=2).backward()
    at_target = logits.grad[0, 0, 2] / (1 / V - 1)
    torch.testing.assert_close(at_target / 2, torch.tensor(1 / 19, dtype=torch.float64))


def test_sequence_mean_weights_every_sequence_equally_by_hand():
    """两条序列的 token loss 全是 log 4（3 个）与 log(4/3)（1 个）：样本平均是两者的算术平均。"""
    row = torch.tensor([0.0, math.log(3.0)])
    labels = torch.tensor([[1, 0, 0, 0], [0, 1, -100, -100]])
    loss = global_sequence_mean_loss(row.expand(2, 4, 2), labels, num_sequences=2)
    torch.testing.assert_close(loss, torch.tensor((math.log(4) + math.log(4 / 3)) / 2))


# ---------------------------------------------------------------- 与独立实现一致


@pytest.mark.parametrize("num_items", [None, 23, torch.tensor(23)])
def test_matches_for_causal_lm_loss_forward_and_gradient(num_items):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 7, V, generator=g)
    labels = torch.randint(V, (3, 7), generator=g)
    labels[0, :4] = -100
    labels[2, 5:] = -100
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    if num_items is None:  # 不传时是微批均值，对应朴素写法
        loss = naive_mean_of_means_loss(ours, labels, grad_accum_steps=1)
    else:
        loss = global_token_mean_loss(ours, labels, num_items_in_batch=num_items)
    expected = ForCausalLMLoss(theirs, labels, vocab_size=V, num_items_in_batch=num_items)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_matches_fixed_cross_entropy_on_shifted_tokens():
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 6, V, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (2, 6), generator=g)
    labels[1, 3:] = -100
    source, target = logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
    torch.testing.assert_close(
        global_token_mean_loss(logits, labels, num_items_in_batch=40),
        fixed_cross_entropy(source, target, num_items_in_batch=40),
    )
    torch.testing.assert_close(
        naive_mean_of_means_loss(logits, labels, grad_accum_steps=1), fixed_cross_entropy(source, target)
    )


def test_accumulation_equals_one_big_batch():
    model = make_model()
    sequences = [[micro for rank in make_sequences() for micro in rank]]  # 一张卡，四个微批
    loss, grad = big_batch(model, flatten(sequences))
    ours = accumulate_gradients(model, [collate(micro) for micro in sequences[0]])
    assert not ours.requires_grad  # 返回值不牵着计算图
    torch.testing.assert_close(ours, loss, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(flat_grad(model), grad, rtol=1e-13, atol=1e-15)


def test_averaged_ranks_with_dp_factor_equal_one_big_batch():
    model, sequences = make_model(), make_sequences()
    loss, grad = big_batch(model, flatten(sequences))
    n = total_valid(sequences)
    ours = [
        (
            accumulate_gradients(model, [collate(m) for m in rank], num_items_in_batch=n, dp_size=W),
            flat_grad(model),
        )
        for rank in sequences
    ]
    torch.testing.assert_close(sum(part for part, _ in ours) / W, loss, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(sum(part for _, part in ours) / W, grad, rtol=1e-13, atol=1e-15)


# 子进程里跑真正的 DDP：各进程用自己的微批反向，前 M-1 次放在 no_sync 里，最后一次由 DDP 求平均
_DDP_WORKER = """
import datetime, json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from snippets.training.loss_averaging import (
    count_valid_labels, global_token_mean_loss, naive_mean_of_means_loss)

torch.set_num_threads(1)
rank, store = int(sys.argv[1]), sys.argv[2]
payload = torch.load(sys.argv[3])
# 同伴不在了就在 60 秒内报错退出，不会永远等下去
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
torch.manual_seed(1)
net = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 11)).double()
net.load_state_dict(payload["state"])
ddp = DistributedDataParallel(net)
micro_batches = payload["ranks"][rank]
num_items = torch.stack([count_valid_labels(y) for _, y in micro_batches]).sum()
dist.all_reduce(num_items)
losses = {
    "naive": lambda z, y: naive_mean_of_means_loss(z, y, grad_accum_steps=len(micro_batches)),
    "without_factor": lambda z, y: global_token_mean_loss(z, y, num_items_in_batch=num_items),
    "with_factor": lambda z, y: global_token_mean_loss(
        z, y, num_items_in_batch=num_items, dp_size=dist.get_world_size()),
}
result = {"num_items": int(num_items)}
for name, loss_fn in losses.items():
    ddp.zero_grad()
    with ddp.no_sync():
        for ids, labels in micro_batches[:-1]:
            loss_fn(ddp(ids), labels).backward()
    ids, labels = micro_batches[-1]
    loss_fn(ddp(ids), labels).backward()
    result[name] = torch.cat([p.grad.flatten() for p in net.parameters()]).tolist()
if rank == 0:
    print(json.dumps(result))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ddp_result(tmp_path_factory):
    """两个真实进程、gloo、本机回环，各跑三种写法；返回 DDP 平均后的梯度。

    用文件会合，不占固定端口；无论成功、失败还是超时，离开时两个子进程都已结束并回收。
    """
    folder = tmp_path_factory.mktemp("ddp")
    sequences = make_sequences()
    payload = {
        "state": make_model().state_dict(),
        "ranks": [[collate(micro) for micro in rank] for rank in sequences],
    }
    torch.save(payload, folder / "payload.pt")
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", _DDP_WORKER]
    with contextlib.ExitStack() as stack:
        workers = []
        for rank in range(2):
            worker = subprocess.Popen(
                [*command, str(rank), str(folder / "store"), str(folder / "payload.pt")],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            workers.append(stack.enter_context(worker))  # 退出时关闭管道并等待
            stack.callback(worker.kill)  # 后进先出：先杀再等；已结束的进程不受影响
        outputs = [worker.communicate(timeout=120) for worker in workers]
        assert all(worker.returncode == 0 for worker in workers), outputs
    result = json.loads(outputs[0][0].splitlines()[-1])
    return {k: torch.tensor(v, dtype=torch.float64) if k != "num_items" else v for k, v in result.items()}


def test_real_ddp_with_factor_equals_one_big_batch(ddp_result):
    _, grad = big_batch(make_model(), flatten(make_sequences()))
    assert ddp_result["num_items"] == total_valid(make_sequences()) == 36
    torch.testing.assert_close(ddp_result["with_factor"], grad, rtol=1e-12, atol=1e-15)


def test_real_ddp_without_factor_is_exactly_w_times_too_small(ddp_result):
    _, grad = big_batch(make_model(), flatten(make_sequences()))
    torch.testing.assert_close(ddp_result["without_factor"] * W, grad, rtol=1e-12, atol=1e-15)


def test_real_ddp_mean_of_means_equals_our_simulation_and_not_the_big_batch(ddp_result):
    model, sequences = make_model(), make_sequences()
    _, grad = big_batch(model, flatten(sequences))
    _, simulated = reduce_over_ranks(
        model, sequences, lambda z, y: naive_mean_of_means_loss(z, y, grad_accum_steps=M)
    )
    torch.testing.assert_close(ddp_result["naive"], simulated, rtol=1e-12, atol=1e-15)
    assert (ddp_result["naive"] - grad).norm() > 0.3 * grad.norm()


def _tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _trainer_gradient(model, sequences, tmp_path, *, micro_batch_size):
    """真实的 Trainer 走一步 SGD（学习率 1、不裁剪），参数之差就是它用的梯度。"""
    from transformers import Trainer, TrainingArguments

    def pad(features):
        ids, labels = collate([f["ids"] for f in features])
        return {"input_ids": ids, "labels": labels, "attention_mask": labels.ne(-100).long()}

    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=len(sequences) // micro_batch_size,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[{"ids": s} for s in sequences], data_collator=pad
    )
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return before - after


TRAINER_LENGTHS = [[[14], [3], [2], [9]]]


def _llama_logits(model):
    return lambda ids: model(input_ids=ids).logits


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_real_trainer_step_equals_our_accumulation(tmp_path, micro_batch_size):
    """transformers 5.23.0：累积 4、2、1 步的 Trainer 都等于本文的正确写法。"""
    sequences = flatten(make_sequences(TRAINER_LENGTHS))
    model = _tiny_llama()
    accumulate_gradients(_llama_logits(model), [collate([s]) for s in sequences])
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 第三方库自己的弃用警告，与本测试无关
        theirs = _trainer_gradient(model, sequences, tmp_path, micro_batch_size=micro_batch_size)
    # 由 float32 参数相减得到的梯度，误差约为参数量级乘 1e-7
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=5e-7)


def test_real_trainer_falls_back_to_mean_of_means_without_loss_kwargs(tmp_path):
    """模型声明 accepts_loss_kwargs=False 时，Trainer 不传分母，只在最后除以累积步数。"""
    sequences = flatten(make_sequences(TRAINER_LENGTHS))
    model = _tiny_llama()
    model.accepts_loss_kwargs = False
    for s in sequences:
        ids, labels = collate([s])
        naive_mean_of_means_loss(_llama_logits(model)(ids), labels, grad_accum_steps=4).backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    accumulate_gradients(_llama_logits(model), [collate([s]) for s in sequences])
    correct = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 第三方库自己的弃用警告，与本测试无关
        theirs = _trainer_gradient(model, sequences, tmp_path, micro_batch_size=1)
    torch.testing.assert_close(theirs, naive, rtol=1e-4, atol=5e-7)
    assert (theirs - correct).norm() > 0.2 * correct.norm()


def test_real_trainer_divides_by_nothing_when_kwargs_are_declared_but_dropped(tmp_path):
    """forward 声明了 **kwargs 却不用 num_items_in_batch：模型取均值，Trainer 又不除 M，梯度变成 M 倍。

    https://github.com/huggingface/transformers/issues/47688
    """
    from transformers import LlamaForCausalLM

    class DropsLossKwargs(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    sequences = flatten(make_sequences(TRAINER_LENGTHS))
    model = _tiny_llama()
    model.__class__ = DropsLossKwargs
    for s in sequences:
        ids, labels = collate([s])
        naive_mean_of_means_loss(_llama_logits(model)(ids), labels, grad_accum_steps=4).backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 第三方库自己的弃用警告，与本测试无关
        theirs = _trainer_gradient(model, sequences, tmp_path, micro_batch_size=1)
    torch.testing.assert_close(theirs, 4 * naive, rtol=1e-4, atol=2e-6)


# ---------------------------------------------------------------- 性质


def test_mean_of_means_is_exact_when_every_count_is_equal():
    model, sequences = (
        make_model(),
        make_sequences([[[6], [4, 2]], [[3, 3], [1, 5]]]),
    )  # 每个微批6 个 token
    loss, grad = big_batch(model, flatten(sequences))
    ours = reduce_over_ranks(
        model, sequences, lambda z, y: naive_mean_of_means_loss(z, y, grad_accum_steps=M)
    )
    torch.testing.assert_close(ours[0], loss, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(ours[1], grad, rtol=1e-13, atol=1e-15)


def test_mean_of_means_error_is_minus_the_covariance_of_count_and_mean():
    """朴素 − 正确 = −Cov(N, 平均 loss) / mean(N)，对 loss 与对每个梯度分量都成立。"""
    model, sequences = make_model(), make_sequences()
    loss, grad = big_batch(model, flatten(sequences))
    naive = reduce_over_ranks(
        model, sequences, lambda z, y: naive_mean_of_means_loss(z, y, grad_accum_steps=M)
    )
    micros = [micro for rank in sequences for micro in rank]
    counts = torch.tensor([sum(len(s) - 1 for s in micro) for micro in micros], dtype=torch.float64)
    per_micro = [big_batch(model, micro) for micro in micros]
    for naive_value, exact, means in [
        (naive[0], loss, torch.stack([part for part, _ in per_micro])),
        (naive[1], grad, torch.stack([part for _, part in per_micro])),
    ]:
        centred = (counts - counts.mean()).reshape(-1, *[1] * (means.dim() - 1))
        covariance = (centred * (means - means.mean(0))).mean(0)
        torch.testing.assert_close(naive_value - exact, -covariance / counts.mean(), rtol=1e-12, atol=1e-14)


def test_mean_of_means_variance_is_arithmetic_over_harmonic_mean_of_counts():
    """token 独立同分布时，估计量 Σ w ℓ 的方差 ∝ Σ w²；119/1 的切分放大 30.25 倍。"""
    counts = torch.tensor([119.0, 1.0], dtype=torch.float64)
    naive = (counts * (1 / (2 * counts)) ** 2).sum()
    exact = 1 / counts.sum()
    torch.testing.assert_close(naive / exact, counts.mean() * (1 / counts).mean())
    torch.testing.assert_close(naive / exact, torch.tensor(30.25210084033613, dtype=torch.float64))


def test_padding_and_micro_batch_layout_change_nothing():
    model, sequences = make_model(), flatten(make_sequences())
    reference, reference_grad = accumulate_gradients(model, [collate(sequences)]), flat_grad(model)
    one_by_one = accumulate_gradients(model, [collate([s]) for s in sequences])
    torch.testing.assert_close(one_by_one, reference)
    torch.testing.assert_close(flat_grad(model), reference_grad)


def test_dividing_gradients_at_the_end_gives_the_same_result():
    """事先数不到 token 时：反向用 sum，累积完再把梯度除以总数。"""
    model, sequences = make_model(), flatten(make_sequences())
    _, grad = big_batch(model, sequences)
    seen = 0
    for s in sequences:
        ids, labels = collate([s])
        token_cross_entropy(model(ids), labels).sum().backward()
        seen += int(count_valid_labels(labels))
    torch.testing.assert_close(flat_grad(model) / seen, grad)


def test_sequence_mean_with_global_count_is_invariant_to_the_split():
    model, sequences = make_model(), flatten(make_sequences())
    big = global_sequence_mean_loss(*_forward(model, sequences), num_sequences=len(sequences))
    parts = [sequences[:1], sequences[1:4], sequences[4:]]  # 每个微批的样本数不等
    split = sum(global_sequence_mean_loss(*_forward(model, p), num_sequences=len(sequences)) for p in parts)
    torch.testing.assert_close(split, big)
    mean_of_means = (
        sum(global_sequence_mean_loss(*_forward(model, p), num_sequences=len(p)) for p in parts) / 3
    )
    assert (mean_of_means - big).abs() > 0.01


def test_one_sequence_per_micro_batch_turns_the_mean_of_means_into_the_sequence_mean():
    model, sequences = make_model(), flatten(make_sequences())
    for s in sequences:
        ids, labels = collate([s])
        naive_mean_of_means_loss(model(ids), labels, grad_accum_steps=len(sequences)).backward()
    naive = flat_grad(model)
    means = [-model(s[:-1]).log_softmax(-1).gather(1, s[1:, None]).mean() for s in sequences]
    (sum(means) / len(means)).backward()
    torch.testing.assert_close(naive, flat_grad(model))


def test_sequence_mean_over_averaged_ranks_needs_the_dp_factor():
    model, sequences = make_model(), make_sequences()
    num_sequences = len(flatten(sequences))
    ids, labels = collate(flatten(sequences))
    global_sequence_mean_loss(model(ids), labels, num_sequences=num_sequences).backward()
    grad = flat_grad(model)
    _, averaged = reduce_over_ranks(
        model,
        sequences,
        lambda z, y: global_sequence_mean_loss(z, y, num_sequences=num_sequences, dp_size=W),
    )
    torch.testing.assert_close(averaged, grad)


@pytest.mark.parametrize("ignore_index", [-100, -1, 7])  # 7 是词表里的 id，如同拿 pad 当忽略值
def test_ignored_labels_get_no_gradient_whatever_the_index(ignore_index):
    logits = torch.randn(2, 4, V, requires_grad=True)
    labels = torch.tensor([[3, ignore_index, 5, 6], [2, 1, ignore_index, ignore_index]])
    n = count_valid_labels(labels, ignore_index=ignore_index)
    assert n == 3
    losses = {
        "token": global_token_mean_loss(logits, labels, num_items_in_batch=n, ignore_index=ignore_index),
        "sequence": global_sequence_mean_loss(logits, labels, num_sequences=2, ignore_index=ignore_index),
        "naive": naive_mean_of_means_loss(logits, labels, grad_accum_steps=1, ignore_index=ignore_index),
    }
    default = labels.masked_fill(labels == ignore_index, -100)
    for name, expected in {
        "token": global_token_mean_loss(logits, default, num_items_in_batch=3),
        "sequence": global_sequence_mean_loss(logits, default, num_sequences=2),
        "naive": naive_mean_of_means_loss(logits, default, grad_accum_steps=1),
    }.items():
        torch.testing.assert_close(losses[name], expected)
    has_target = torch.tensor([[False, True, True, False], [True, False, False, False]])
    for loss in losses.values():
        (grad,) = torch.autograd.grad(loss, logits)
        assert torch.equal(grad.abs().sum(-1) > 0, has_target)


def _forward(model, sequences):
    ids, labels = collate(sequences)
    return model(ids), labels


def test_sequence_mean_and_token_mean_are_different_objectives():
    """loss 的数值只差千分之一，梯度却差 10% 以上：不能拿 loss 相近当作等价的证据。"""
    model, sequences = make_model(), flatten(make_sequences())
    token, token_grad = big_batch(model, sequences)
    sequence = global_sequence_mean_loss(*_forward(model, sequences), num_sequences=len(sequences))
    sequence.backward()
    assert abs(sequence - token) < 1e-3
    assert (flat_grad(model) - token_grad).norm() > 0.1 * token_grad.norm()


def test_training_with_accumulation_follows_the_big_batch():
    """AdamW 走 20 步：正确累积与大 batch 的参数一致，朴素累积分岔。"""
    groups = [flatten(make_sequences(seed=s)) for s in range(4)]
    finals = {}
    for name in ("big", "correct", "naive"):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        for step in range(20):
            group = groups[step % 4]
            if name == "big":
                ids, labels = collate(group)
                F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
            elif name == "correct":
                accumulate_gradients(model, [collate([s]) for s in group])
            else:
                for ids, labels in (collate([s]) for s in group):
                    naive_mean_of_means_loss(model(ids), labels, grad_accum_steps=len(group)).backward()
            optimizer.step()
            optimizer.zero_grad()
        finals[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(finals["correct"], finals["big"], rtol=1e-9, atol=1e-12)
    assert (finals["naive"] - finals["big"]).norm() > 0.05 * finals["big"].norm()


# ---------------------------------------------------------------- 边界


def test_fully_masked_micro_batch_gives_zero_loss_and_zero_gradient():
    logits = torch.randn(2, 5, V, requires_grad=True)
    labels = torch.full((2, 5), -100)
    for loss in (
        global_token_mean_loss(logits, labels, num_items_in_batch=7),
        global_sequence_mean_loss(logits, labels, num_sequences=3),
    ):
        logits.grad = None
        loss.backward()
        assert loss == 0 and logits.grad.abs().max() == 0


def test_mean_reduction_on_a_fully_masked_micro_batch_is_nan():
    """F.cross_entropy(mean)：loss 是 NaN，CPU 上梯度是 0；手写的掩码均值连梯度也是 NaN。"""
    logits = torch.randn(1, 4, V, requires_grad=True)
    labels = torch.full((1, 4), -100)
    loss = F.cross_entropy(logits[0], labels[0])
    loss.backward()
    assert loss.isnan() and logits.grad.abs().max() == 0
    assert naive_mean_of_means_loss(logits, labels, grad_accum_steps=2).isnan()
    logits.grad = None
    mask = torch.zeros(4)
    masked_mean = (-logits[0].log_softmax(-1)[:, 0] * mask).sum() / mask.sum()
    masked_mean.backward()
    assert masked_mean.isnan() and logits.grad.isnan().all()


def test_single_token_sequence_has_no_target():
    labels = torch.tensor([[3]])
    assert count_valid_labels(labels) == 0
    assert token_cross_entropy(torch.zeros(1, 1, V), labels).shape == (1, 0)


def test_bfloat16_in_bfloat16_out():
    logits, labels = torch.randn(2, 5, V).bfloat16(), torch.randint(V, (2, 5))
    loss = global_token_mean_loss(logits, labels, num_items_in_batch=8)
    assert loss.dtype == torch.bfloat16 and loss.isfinite()


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("num_items_in_batch=0：", lambda z, y: global_token_mean_loss(z, y, num_items_in_batch=0)),
        (
            "num_items_in_batch=0：",
            lambda z, y: global_token_mean_loss(z, y, num_items_in_batch=torch.tensor(0)),
        ),
        ("dp_size=0：", lambda z, y: global_token_mean_loss(z, y, num_items_in_batch=4, dp_size=0)),
        ("grad_accum_steps=0：", lambda z, y: naive_mean_of_means_loss(z, y, grad_accum_steps=0)),
        ("num_sequences=0：", lambda z, y: global_sequence_mean_loss(z, y, num_sequences=0)),
        ("dp_size=0：", lambda z, y: global_sequence_mean_loss(z, y, num_sequences=1, dp_size=0)),
        (
            "必须传入 num_items_in_batch",
            lambda z, y: accumulate_gradients(lambda ids: z, [(y, y)], dp_size=2),
        ),
    ],
)
def test_meaningless_scalars_are_refused_by_name(message, call):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 3, V), torch.zeros(1, 3, dtype=torch.long))


def test_one_valid_token_is_enough():
    """三个目标只留一个，logits 全 0：loss 就是 log V。"""
    labels = torch.tensor([[3, -100, -100, 1]])
    loss = global_token_mean_loss(torch.zeros(1, 4, V), labels, num_items_in_batch=1)
    torch.testing.assert_close(loss, torch.tensor(float(V)).log())


# ---------------------------------------------------------------- 被拒绝的错误写法


def _unshifted_count(labels):
    return int(labels.ne(-100).sum())


def _count_with_padding(labels):
    return labels[:, 1:].numel()


def _wrong_versions(sequences):
    """名字 → 本微批的 loss。全部都流传甚广。"""
    n = total_valid(sequences)
    labels = [collate(micro)[1] for rank in sequences for micro in rank]
    unshifted = sum(map(_unshifted_count, labels))
    padded = sum(map(_count_with_padding, labels))

    def token_sum(z, y):
        return token_cross_entropy(z, y).sum()

    return {
        "均值的均值": lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()) / M,
        "除了全局数又除 M": lambda z, y: token_sum(z, y) * W / n / M,
        "漏乘 W": lambda z, y: token_sum(z, y) / n,
        "数标签不移位": lambda z, y: token_sum(z, y) * W / unshifted,
        "数了 padding": lambda z, y: token_sum(z, y) * W / padded,
        "只用本微批的数": lambda z, y: token_sum(z, y) / count_valid_labels(y),
        "样本平均冒充 token 平均": lambda z, y: global_sequence_mean_loss(z, y, num_sequences=8, dp_size=W),
    }


@pytest.mark.rejects
@pytest.mark.parametrize("name", list(_wrong_versions(make_sequences())))
def test_wrong_version_is_rejected(name):
    model, sequences = make_model(), make_sequences()
    loss, grad = big_batch(model, flatten(sequences))
    wrong_loss, wrong_grad = reduce_over_ranks(model, sequences, _wrong_versions(sequences)[name])
    assert (wrong_grad - grad).norm() > 0.1 * grad.norm()
    n = total_valid(sequences)
    right_loss, right_grad = reduce_over_ranks(
        model, sequences, lambda z, y: global_token_mean_loss(z, y, num_items_in_batch=n, dp_size=W)
    )
    torch.testing.assert_close(right_loss, loss)
    torch.testing.assert_close(right_grad, grad)


@pytest.mark.parametrize(
    ("name", "factor"), [("除了全局数又除 M", 1 / M), ("漏乘 W", 1 / W), ("数标签不移位", 36 / 44)]
)
def test_scale_errors_are_exact_constants(name, factor):
    """这三种只把梯度乘了一个常数，方向不变，所以 AdamW 几乎察觉不到。"""
    model, sequences = make_model(), make_sequences()
    _, grad = big_batch(model, flatten(sequences))
    _, wrong = reduce_over_ranks(model, sequences, _wrong_versions(sequences)[name])
    torch.testing.assert_close(wrong, grad * factor)

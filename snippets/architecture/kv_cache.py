r"""KV cache：追加、裁掉、重排、滑动窗口、分页；大小与算术强度的公式；朴素的量化。

页面：docs/architecture/kv-cache.md
不包含：预先分配的缓存、左填充、滑动窗口的分块预填充、前缀缓存的哈希与写时复制、量化后的打包存放。

轴：`B` 序列数，`K` 键值头数，`T` 这次新算的 token 数，`S` 缓存里的 token 数，`D` 每头维数。
一层一个缓存，存旋转（RoPE）之后、复制给各查询头之前的键，与原样的值。
大小与强度的函数只做四则运算，传 SymPy 符号就得到公式；强度的单位是浮点运算数每字节，乘加算两次。

References:
    Kwon et al., "PagedAttention", §3.1、§4.1–4.3，https://arxiv.org/abs/2309.06180
    Williams et al., "Roofline", CACM 52(4), 2009
    Liu et al., "KIVI", §3，https://arxiv.org/abs/2402.02750
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snippets.scalars import Scalar

__all__ = [
    "KVCache",
    "SlidingWindowCache",
    "BlockPool",
    "PagedKVCache",
    "kv_cache_bytes",
    "linear_intensity",
    "attention_intensity",
    "decode_step_seconds",
    "fake_quantize",
]

KV = Float[Tensor, "B K S D"]


# --8<-- [start:cache]
class KVCache:
    """一层的缓存，每步用 `torch.cat` 接在后面，同 transformers 5.23.0 的 `DynamicLayer`。"""

    def __init__(self):
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """已经存了几个 token，也是下一个 token 的位置。"""
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]) -> tuple[KV, KV]:
        """把新的键值接在 token 轴的末尾，返回全部。

        Args:
            k: 新的键，已经旋转。
            v: 新的值。

        Returns:
            从第 0 个 token 起的全部键与值。
        """
        if self.keys is not None:
            k, v = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        self.keys, self.values = k, v
        return k, v

    def crop(self, length: int) -> None:
        """只留最前面的 `length` 个 token：推测解码被拒的后缀由此回滚。

        Args:
            length: 留下几个；transformers 5.23.0 的 `crop` 收的是负的删除个数。
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"缓存里有 {self.length} 个 token，留不下 {length} 个；请给 0 到它之间的数。")
        if length < self.length:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

    def reorder(self, indices: Int[Tensor, " B_new"]) -> None:
        """第 i 条换成原来的第 `indices[i]` 条：束搜索换父束，或把一条前缀复制给多条。

        Args:
            indices: 每条新序列的父序列，可以重复、可以变多或变少。
        """
        self.keys = self.keys.index_select(0, indices)
        self.values = self.values.index_select(0, indices)


# --8<-- [end:cache]
# --8<-- [start:window]
class SlidingWindowCache:
    """只留最近 `window` 个 token 的缓存，一次只收一个 token。

    Args:
        window: 每个 query 看得见几个 key，含自己。
    """

    def __init__(self, *, window: int):
        if window < 1:
            raise ValueError(f"window={window}，一个 key 也留不下；至少取 1。")
        self.cache, self.window, self.length = KVCache(), window, 0

    def update(self, k: Float[Tensor, "B K T D"], v: Float[Tensor, "B K T D"]) -> tuple[KV, KV]:
        """接上一个 token，扔掉窗口之外的。

        注意：`length` 数的是见过的 token，不是存着的：位置要接着数。

        Args:
            k: 新的键，已经旋转，`T` 只能是 1。
            v: 新的值。

        Returns:
            最近的至多 `window` 个键与值。
        """
        if k.shape[2] != 1:
            raise ValueError(f"一次来了 {k.shape[2]} 个 token，各自的窗口不同，要另加掩码；请逐个送入。")
        k, v = (x[:, :, -self.window :] for x in self.cache.update(k, v))
        self.cache.keys, self.cache.values = k, v
        self.length += 1
        return k, v


# --8<-- [end:window]
# --8<-- [start:paged]
class BlockPool:
    """一层共用的显存池，切成等大的块。

    Args:
        num_blocks: 块数。
        block_size: 每块放几个 token。
        num_kv_heads: 键值头数。
        head_dim: 每头维数。
        dtype: 存放的类型。
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.block_size, self.free = block_size, list(range(num_blocks))
        self.keys = torch.zeros(num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype)
        self.values = torch.zeros_like(self.keys)


class PagedKVCache:
    """一条序列的分页缓存：块表记下第几块在池里的哪里，块不必相邻。

    Args:
        pool: 与别的序列共用的池。
    """

    def __init__(self, pool: BlockPool):
        self.pool, self.block_table, self.length = pool, [], 0

    def update(self, k: Float[Tensor, "1 K T D"], v: Float[Tensor, "1 K T D"]) -> tuple[KV, KV]:
        """写进块里，写满了才要下一块；再按块表取回全部。

        Args:
            k: 一条序列的新键。
            v: 一条序列的新值。

        Returns:
            按位置排好的全部键与值；真正的内核直接按块表读，不做这次收集。
        """
        pool, size = self.pool, self.pool.block_size
        for step in range(k.shape[2]):
            if self.length % size == 0:
                if not pool.free:
                    raise ValueError("池里没有空块；请先释放或换出别的序列，或加大 num_blocks。")
                self.block_table.append(pool.free.pop())
            slot = self.block_table[-1], self.length % size
            pool.keys[slot], pool.values[slot] = k[0, :, step], v[0, :, step]
            self.length += 1
        k, v = (x[self.block_table].flatten(0, 1)[: self.length] for x in (pool.keys, pool.values))
        return k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)

    def release(self) -> None:
        """序列结束，块全部还给池。"""
        self.pool.free += self.block_table
        self.block_table, self.length = [], 0


# --8<-- [end:paged]
# --8<-- [start:size]
def kv_cache_bytes(
    *,
    num_layers: Scalar,
    num_kv_heads: Scalar,
    head_dim: Scalar,
    num_tokens: Scalar,
    batch_size: Scalar = 1,
    bytes_per_element: Scalar = 2,
) -> Scalar:
    r"""KV cache 的字节数；开头的 2 是键与值各一份。

    $$
    2\,L\,K\,D\,S\,B\,c
    $$

    注意：$K$ 是键值头数，不是查询头数。

    Args:
        num_layers: 层数 $L$。
        num_kv_heads: 键值头数 $K$。
        head_dim: 每头维数 $D$。
        num_tokens: 每条序列的 token 数 $S$，提示与生成都算；滑动窗口的层至多是窗口。
        batch_size: 序列条数 $B$。
        bytes_per_element: 每个元素几字节 $c$；bf16、fp16 是 2。

    Returns:
        字节数。
    """
    return 2 * num_layers * num_kv_heads * head_dim * num_tokens * batch_size * bytes_per_element


# --8<-- [end:size]
# --8<-- [start:intensity]
def linear_intensity(
    *, num_tokens: Scalar, in_features: Scalar, out_features: Scalar, bytes_per_element: Scalar = 2
) -> Scalar:
    r"""线性层的算术强度：输入、权重各读一遍，输出写一遍。

    $$
    \frac{2nC_{\text{in}}C_{\text{out}}}{c\,(nC_{\text{in}}+C_{\text{in}}C_{\text{out}}+nC_{\text{out}})}
    $$

    Args:
        num_tokens: 这一步整批的 token 数 $n=BT$，解码时就是 $B$。
        in_features: 输入宽度。
        out_features: 输出宽度。
        bytes_per_element: 每个元素几字节 $c$。

    Returns:
        浮点运算数每字节；$n$ 远小于两个宽度时约为 $2n/c$。
    """
    flops = 2 * num_tokens * in_features * out_features
    elements = num_tokens * in_features + in_features * out_features + num_tokens * out_features
    return flops / (elements * bytes_per_element)


def attention_intensity(
    *, num_queries: Scalar, num_keys: Scalar, num_groups: Scalar, bytes_per_element: Scalar = 2
) -> Scalar:
    r"""打分与加权的算术强度：$K$、$V$、$q$ 各读一遍，输出写一遍，中间的 $T\times S$ 矩阵不落显存。

    $$
    \frac{4gTSD}{c\,(2SD+2gTD)}=\frac{2gTS}{c\,(S+gT)}
    $$

    注意：与批大小、每头维数无关；不计因果掩码省下的一半。

    Args:
        num_queries: 每条序列的 query 数 $T$；解码是 1，预填充是 $S$。
        num_keys: 每条序列的 key 数 $S$。
        num_groups: 共用一个键值头的查询头数 $g=H/K$。
        bytes_per_element: 每个元素几字节 $c$。

    Returns:
        浮点运算数每字节；解码时 $S$ 很大，约为 $2g/c$。
    """
    return (
        2 * num_groups * num_queries * num_keys / (bytes_per_element * (num_keys + num_groups * num_queries))
    )


def decode_step_seconds(*, weight_bytes: Scalar, cache_bytes: Scalar, bandwidth: Scalar) -> Scalar:
    r"""解码一步的时间下界：权重与整批的缓存至少各读一遍。

    Args:
        weight_bytes: 这一步要读的权重，字节。
        cache_bytes: 整批的 KV cache，字节。
        bandwidth: 显存带宽，字节每秒。

    Returns:
        秒；一步生成整批的 $B$ 个 token。
    """
    return (weight_bytes + cache_bytes) / bandwidth


# --8<-- [end:intensity]
# --8<-- [start:quantize]
def fake_quantize(x: Float[Tensor, "*batch S D"], *, num_bits: int, dim: int) -> Float[Tensor, "*batch S D"]:
    r"""非对称的均匀量化再还原：沿 `dim` 取最小、最大值，分成 $2^b-1$ 格。

    Args:
        x: 键或值。
        num_bits: 位数 $b$。
        dim: 共用一个格距的那一维；`-2` 是逐通道（跨 token），`-1` 是逐 token（跨通道）。

    Returns:
        还原后的张量，误差不超过半格；整组相等时原样返回。
    """
    low, high = x.amin(dim=dim, keepdim=True), x.amax(dim=dim, keepdim=True)
    step = (high - low) / (2**num_bits - 1)
    levels = torch.where(step > 0, (x - low) / step, 0.0).round()
    return low + levels * step


# --8<-- [end:quantize]

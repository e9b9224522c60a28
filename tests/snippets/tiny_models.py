"""测试用的随机小模型与按词分词的分词器：真的走 transformers 与 TRL 的代码，不下载任何东西。"""


def word_tokenizer(words, *, unknown):
    """一个词一个 token，id 是它在 words 里的位置；words 要含 <pad> 与 <eos>。"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # 不登记 unk_token：它会成为特殊符号，解码时被略去
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_gpt2(vocab_size):
    """一层、没有 dropout 的 GPT-2；填充是 0，结束符是 1。"""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": vocab_size, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **tokens, **dropout))


def tiny_llama(vocab_size, *, num_hidden_layers):
    """分组查询的小 Llama；初始化放大到 0.5：默认 0.02 时各 token 几乎等概率，比较不出差别。"""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.5,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )

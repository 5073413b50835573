"""Networks of transformers, made from a configuration, and batches of them; nothing is downloaded."""

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(20)]
PADDED = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "labels": -100}


def tokenizer():
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["[PAD]", *WORDS])}, "[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


def texts(number, seed=0):
    """Texts of 3 to 9 words."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (number,), generator=draw).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(20, (length,), generator=draw).tolist()) for length in lengths]


def loader(number, batch_size, labels, seed=0):
    """Batches as transformers' own tokenizer makes them, padded to their longest text."""
    encode = tokenizer()

    def collate(pairs):
        batch = encode([text for text, _ in pairs], padding=True, return_tensors="pt")
        if labels == "classes":
            batch["labels"] = torch.tensor([label for _, label in pairs])
        else:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    data = [(text, text.count("w1") % 3) for text in texts(number, seed)]
    return DataLoader(data, batch_size=batch_size, collate_fn=collate)


def join(batches):
    """One batch of all the texts, padded to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    whole = {}
    for key in batches[0]:
        parts = [batch[key] for batch in batches]
        if parts[0].dim() == 2:
            places = [torch.nn.functional.pad(p, (0, longest - p.shape[1]), value=PADDED[key]) for p in parts]
        else:
            places = parts
        whole[key] = torch.cat(places)
    return BatchEncoding(whole)


def bert():
    torch.manual_seed(0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=21, num_labels=3, **size, **none))


def gpt2():
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=21, n_positions=16, n_embd=8, n_layer=2, n_head=2, **none))


def predicted_tokens(batch):
    """What GPT-2's loss is a mean over: it predicts every token but a text's first."""
    return (batch["labels"][:, 1:] != -100).sum()


class Wrapped(pl.LightningModule):
    """Hands what the network returns to Lightning as it is: a ModelOutput with ``loss`` and ``logits``."""

    def __init__(self, net, lr):
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch, batch_idx):
        return self.net(**batch)

    def validation_step(self, batch, batch_idx):
        return self.net(**batch)

    def configure_optimizers(self):
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trainable, lr=self.lr, momentum=0.9)


def loss_of(module, batch):
    return module.net(**batch).loss

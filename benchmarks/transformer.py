"""A decoder from its sizes as an operator graph, without torch: what tables of published runs name.

The graph has the ops that ``torch.export`` gives for such a model in plain PyTorch, one for each
kernel that its authors ran: query, key and value in one product where they have equal heads;
softmax with its scale and mask; rotary positions as one pass over queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from autopar.ir.graph import Dtype, Input, Operator, OperatorGraph, Role, Tensor, TensorSpec

DROPOUT, EPSILON = 0.1, 1e-5


@dataclass(frozen=True, slots=True)
class Experts:
    """In place of an MLP, ``count`` of them, each ``ffn`` wide. ``chosen``: by each token.
    ``groups``: parts of a sequence that are sent to experts for themselves.

    A token's places among the experts follow from its position, so that all experts have as many
    tokens: benchmarks are run with balance forced. The router gives their weights. ``shared``: the
    width of an MLP that works on all tokens beside them; ``after``: so many layers with an MLP come
    first. ``biased``: what an expert gives has a bias. ``clamped``: what goes into the product of
    its two factors is held within bounds.

    What programs do beside: ``sorted``: what arrives from other devices is put in the order of
    experts, and back; ``padded``: to as many rows as narrow products take. ``steps``: kernels of a
    few numbers each that find out where tokens go, for which the host waits. ``apart``: weights of
    experts are parameters of their own to the host. ``full``: each takes as many tokens whatever
    the router says.
    """

    count: int
    chosen: int
    ffn: int
    groups: int = 1
    shared: int = 0
    after: int = 0
    biased: bool = False
    clamped: bool = False
    sorted: bool = False
    padded: bool = False
    steps: int = 0
    apart: bool = False
    full: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Attention whose keys and values are made of one narrow vector for each token (DeepSeek-V2,
    arXiv 2405.04434, section 2.1): ``keys`` wide, and ``queries`` that of queries (0: these are
    made directly). Of a head ``plain`` numbers of queries and keys have no position and ``rotary``
    have, the latter of keys for all heads together; ``values``: the width of its values."""

    keys: int
    queries: int = 0
    plain: int = 128
    rotary: int = 64
    values: int = 128


@dataclass(frozen=True, slots=True)
class Transformer:
    """``gated``: SwiGLU, RMSNorm and rotary positions, without biases (Llama); else GELU, LayerNorm
    and learned positions (GPT), the last two with ``biased``. ``flash``: fused attention; else its
    products are separate. ``tied``: one table for embedding and head. ``fused_loss``: the loss
    reads logits as they are (llm-foundry's default, ``fused_crossentropy``), else in fp32.
    ``products``: the dtype to which operands of the products of blocks are cast, each tensor once;
    with ``engine`` as Transformer Engine does it: norms write what products take, and weights are
    kept so, for rows and for columns (two narrow bytes: as many as a wide element has).
    ``fused``: the kernels of ``benchmarks/kernels.py`` in place of what ATen has for norms, SwiGLU,
    dropout, softmax and, with ``fused_loss``, cross-entropy; ``one_pass``: norms whose backward is
    one pass. ``wide_rotary``: rotary positions are products of complex numbers in fp32.
    ``divided_loss``: cross-entropy in steps, with divided classes. ``metrics``: cross-entropies
    that are measured beside the loss.
    ``latent``: in place of plain heads. ``near``: of keys that a query sees in the mean of all
    layers, where some see a window only (0: all before it). ``scaled``: rotary positions are.
    ``normed_heads``: queries and keys are normalised, head by head. ``parallel``: attention and MLP
    of a block read the same. ``cast_norms``: norms write wide, and what products take is cast from
    it. ``repeated``: keys and values are made for each head of queries before attention. ``ring``:
    they go round the devices that have parts of the sequence.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    length: int
    gated: bool = False
    biased: bool = True
    flash: bool = True
    dropout: bool = False
    tied: bool = True
    fused_loss: bool = False
    dtype: str = "bfloat16"
    head_width: int | None = None
    products: str | None = None
    experts: Experts | None = None
    engine: bool = False
    fused: bool = False
    one_pass: bool = False
    wide_rotary: bool = False
    divided_loss: bool = False
    metrics: int = 0
    latent: Latent | None = None
    near: int = 0
    parallel: bool = False
    cast_norms: bool = False
    scaled: bool = False
    normed_heads: bool = False
    repeated: bool = False
    ring: bool = False

    def graph(self, batch: int) -> OperatorGraph:
        """Of one global batch."""
        return _Builder(self, batch).graph()

    @property
    def value_width(self) -> int:
        """Of a head."""
        return self.latent.values if self.latent else self.head_width or self.width // self.heads

    @property
    def weights_of_a_token(self) -> int:
        """Of all products that it goes through."""
        mlps = (2 + self.gated) * self.width
        wide, narrow = mlps * self.ffn, 0
        after = self.layers
        if self.experts is not None:
            chosen = self.experts.chosen * self.experts.ffn + self.experts.shared
            narrow, after = mlps * chosen + self.width * self.experts.count, self.experts.after
        blocks = after * wide + (self.layers - after) * narrow
        return blocks + self.layers * self._attention_weights + self.width * self.vocabulary

    @property
    def _attention_weights(self) -> int:
        given = self.heads * self.value_width * self.width
        if self.latent is None:
            return 2 * given + 2 * self.kv_heads * self.value_width * self.width
        of, head = self.latent, self.latent.plain + self.latent.rotary
        queries = self.heads * head * (of.queries or self.width) + self.width * of.queries
        keys = of.keys * self.heads * (of.plain + of.values) + self.width * (of.keys + of.rotary)
        return queries + keys + given


@dataclass
class _Builder:
    of: Transformer
    batch: int
    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    by_gradient: dict[str, bool] = field(default_factory=dict)
    narrow: dict[str, str] = field(default_factory=dict)

    @property
    def head_width(self) -> int:
        return self.of.head_width or self.of.width // self.of.heads

    def graph(self) -> OperatorGraph:
        of = self.of
        tokens = self._given("tokens", (self.batch, of.length), "int64", Role.INPUT)
        targets = self._given("targets", (self.batch, of.length), "int64", Role.INPUT)
        x, table = self._embedded(tokens)
        tables = self._rotary() if of.gated else ()
        for layer in range(of.layers):
            chosen = None if of.experts is None or layer < of.experts.after else of.experts
            x = self._block(x, f"blocks.{layer}", tables, chosen)
        x = self._norm(x, "norm")
        head = table if of.tied else self._parameter("head.weight", (of.vocabulary, of.width))
        logits = self._op("head", "linear", (x, head), (self.batch, of.length, of.vocabulary))
        if not of.fused_loss:
            logits = self._cast(logits, "float32", "")
        # (sample, class, position): samples and positions stay apart, for axes that divide either
        by_class = (self.batch, of.vocabulary, of.length)
        logits = self._op("", "transpose.int", (logits,), by_class, 1, 2)
        kernel = "fused.cross_entropy" if of.fused and of.fused_loss else "cross_entropy_loss"
        kernel = "fused.cross_entropy.divided" if of.divided_loss else kernel
        loss = self._op("", kernel, (logits, targets), ())
        for _ in range(of.metrics):
            self._measured(logits, targets)
        return OperatorGraph(
            tuple(self.tensors),
            tuple(self.operators),
            loss,
            ("tokens", "targets"),
            ("", ""),
            name="transformer",
        )

    # ---- parts ---------------------------------------------------------------------------------

    def _embedded(self, tokens: str) -> tuple[str, str]:
        of = self.of
        shape = (self.batch, of.length, of.width)
        table = self._parameter("tokens.weight", (of.vocabulary, of.width))
        x = self._op("tokens", "embedding", (table, tokens), shape)
        if not of.gated:
            places = self._parameter("positions", (of.length, of.width))
            x = self._op("", "add.Tensor", (x, places), shape)
            x = self._dropped(x, "")
        return x, table

    def _rotary(self) -> tuple[str, ...]:
        latent = self.of.latent
        shape = (self.of.length, self.head_width if latent is None else latent.rotary)
        return (self._given("rotary", shape, self.of.dtype, Role.BUFFER),)

    def _once(self, name: str, length: int) -> str:
        """What is as long as the keys that queries see."""
        if name in self.specs:
            return name
        return self._given(name, (length,), self.of.dtype, Role.BUFFER)

    def _block(
        self, x: str, name: str, tables: tuple[str, ...], experts: Experts | None = None
    ) -> str:
        attention = self._attention if self.of.latent is None else self._latent_attention
        if self.of.parallel:
            both = self._norm(x, f"{name}.norm_1", narrow=True)
            z, y = attention(both, name, tables), self._mlp(both, name, self.of.ffn)
            return self._residual(
                x, self._op(name, "add.Tensor", (z, y), self.specs[x].shape), name
            )
        y = attention(self._norm(x, f"{name}.norm_1", narrow=True), name, tables)
        x = self._residual(x, y, name)
        y = self._norm(x, f"{name}.norm_2", narrow=experts is None)
        if experts is None:
            return self._residual(x, self._mlp(y, name, self.of.ffn), name)
        chosen = self._expert_mlp(y, name, experts)
        if experts.shared:
            shared = self._mlp(y, f"{name}.shared", experts.shared)
            chosen = self._op(name, "add.Tensor", (chosen, shared), self.specs[chosen].shape)
        return self._residual(x, chosen, name)

    def _residual(self, x: str, y: str, name: str) -> str:
        shape = self.specs[x].shape
        if self.of.dropout and self.of.fused:
            y = self._dropped(y, name, "fused.dropout.into_sum")
            return self._op(name, "fused.sum", (x, y), shape)
        return self._op(name, "add.Tensor", (x, self._dropped(y, name)), shape)

    def _mlp(self, y: str, name: str, ffn: int) -> str:
        of = self.of
        up = self._linear(y, f"{name}.up", ffn)
        if of.gated:
            up = self._swiglu(self._linear(y, f"{name}.gate", ffn), up, name)
        else:
            up = self._op(name, "gelu", (up,), self.specs[up].shape)
        return self._linear(up, f"{name}.down", of.width)

    def _swiglu(self, gate: str, up: str, name: str, *weights: str) -> str:
        """``weights``: of rows, where it applies them."""
        shape = self.specs[up].shape
        if self.of.fused:
            return self._op(name, "fused.swiglu", (gate, up, *weights), shape)
        gate = self._op(name, "silu", (gate,), shape)
        return self._op(name, "mul.Tensor", (gate, up), shape)

    def _expert_mlp(self, y: str, name: str, of: Experts) -> str:
        width = self.of.width
        batch, groups, tokens = self.batch, of.groups, self.of.length // of.groups
        each = -(-tokens * of.chosen // of.count)  # tokens of a group for one expert
        of_tokens = (batch, groups, tokens, of.chosen, 1)
        weights = self._routed(y, name, of, of_tokens)
        shape = (batch, groups, tokens, 1, width)
        y = self._op(name, "view", (y,), shape, shape)
        chosen = (batch, groups, tokens, of.chosen, width)
        y = self._op(name, "expand", (y,), chosen, chosen)
        y = self._op(name, "clone", (y,), chosen)
        by_expert = (batch, groups, of.count, each, width)
        y = self._shared_out(y, name, by_expert)
        sent = (of.count, batch, groups, each, width)
        y = self._op(name, "permute", (y,), sent, (2, 0, 1, 3, 4))
        applied = ()
        if self.of.fused:
            shape = (*by_expert[:-1], 1)
            w = self._shared_out(weights, name, shape)
            shape = (*sent[:-1], 1)
            applied = (self._op(name, "permute", (w,), shape, (2, 0, 1, 3, 4)),)
        ordered = ["fused.moved.strided" if of.full else "fused.moved"] * of.sorted
        arranged = (*ordered, *["fused.moved"] * of.padded)
        for kernel in arranged:
            y = self._op(name, kernel, (y,), sent)
        y = self._one_expert(y, name, of, applied)
        if of.biased and applied:
            bias = self._parameter(f"{name}.experts.bias", (of.count, width))
            y = self._op(name, "fused.expert_bias", (y, bias, *applied), sent)
        for kernel in reversed(arranged):
            y = self._op(name, kernel, (y,), sent)
        y = self._op(name, "permute", (y,), by_expert, (1, 2, 0, 3, 4))
        y = self._shared_out(y, name, chosen, "reshape")
        if not applied:
            y = self._op(name, "mul.Tensor", (y, weights), chosen)
        y = self._op(name, "sum.dim_IntList", (y,), (*chosen[:3], width), (3,))
        whole = (batch, self.of.length, width)
        return self._op(name, "view", (y,), whole, whole)

    def _shared_out(self, x: str, name: str, shape: tuple[int, ...], view: str = "view") -> str:
        """Where experts do not share tokens evenly, all have room for one more."""
        if prod(self.specs[x].shape) == prod(shape):
            return self._op(name, view, (x,), shape, shape)
        return self._op(name, "fused.spread", (x,), shape)

    def _routed(self, y: str, name: str, of: Experts, shape: tuple[int, ...]) -> str:
        """The weights of the chosen."""
        router = self._parameter(f"{name}.router.weight", (of.count, self.of.width))
        scores = (self.batch, self.of.length, of.count)
        scored = self._op(f"{name}.router", "linear", (y, router), scores)
        scored = self._op(name, "softmax.int", (scored,), scores, -1)
        made = (*scores[:2], of.chosen)
        kinds = [(made, self.of.dtype), (made, "int64")]
        best, places = self._outputs(name, "topk", (scored,), kinds, of.chosen)
        for left in reversed(range(of.steps)):
            kernel = "fused.moved" if left else "fused.moved.awaited"
            places = self._op(name, kernel, (places,), made)
        return self._op(name, "view", (best,), shape, shape)

    def _one_expert(self, y: str, name: str, of: Experts, weights: tuple[str, ...]) -> str:
        up = self._by_experts(y, f"{name}.experts.up", of.ffn, apart=of.apart)
        gate = self._by_experts(y, f"{name}.experts.gate", of.ffn)  # one product with the other
        if of.clamped:
            gate = self._op(name, "fused.clamped.above", (gate,), self.specs[gate].shape)
            up = self._op(name, "fused.clamped.on_both_sides", (up,), self.specs[up].shape)
        up = self._swiglu(gate, up, name, *weights)
        return self._by_experts(up, f"{name}.experts.down", self.of.width, apart=of.apart)

    def _by_experts(self, x: str, name: str, out: int, *, apart: bool = False) -> str:
        """A product for each expert."""
        shape = self.specs[x].shape
        weight = self._parameter(f"{name}.weight", (shape[0], out, shape[-1]))
        read = (self._narrowed(x, name), self._narrowed_weight(weight, name))
        made = [((*shape[:-1], out), self.of.dtype)]
        if apart:
            return self._add(name, "fused.grouped", read, made, (Input(0), Input(1)), ())[0]
        arguments = ("ebgcw,efw->ebgcf", (Input(0), Input(1)))
        return self._add(name, "einsum", read, made, arguments, ())[0]

    def _attention(self, y: str, name: str, tables: tuple[str, ...]) -> str:
        of, d = self.of, self.head_width
        q, k, v = self._projected(y, name)
        if of.normed_heads:
            q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        for table in tables:
            q, k = (self._rotated(t, table, name) for t in (q, k))
        shape = (self.batch, of.heads, of.length, d)
        if of.repeated and of.kv_heads != of.heads:
            k, v = (self._op(name, "fused.repeated", (t,), shape) for t in (k, v))
        if of.ring:
            every = self._once("sequence", of.length)
            z = self._op(name, "fused.ring_attention", (q, k, v, every), shape)
        elif of.near:
            z = self._op(
                name, "fused.near_attention", (q, k, v, self._once("near", of.near)), shape
            )
        elif of.flash:
            grouped = (("enable_gqa", True),) if self.specs[k].shape != shape else ()
            z = self._op(
                name,
                "scaled_dot_product_attention",
                (q, k, v),
                shape,
                None,
                0.0,
                True,
                keywords=grouped,
            )
        else:
            scores = (self.batch, of.heads, of.length, of.length)
            k = self._op(name, "transpose.int", (k,), (self.batch, of.heads, d, of.length), 2, 3)
            p = self._op(name, "matmul", (q, k), scores)
            p = self._dropped(self._softmax(p, name), name)
            z = self._op(name, "matmul", (p, v), shape)
        z = self._op(name, "transpose.int", (z,), (self.batch, of.length, of.heads, d), 1, 2)
        flat = (self.batch, of.length, of.heads * d)
        return self._linear(self._op(name, "reshape", (z,), flat, flat), f"{name}.out", of.width)

    def _latent_attention(self, y: str, name: str, tables: tuple[str, ...]) -> str:
        """Up to heads from what is narrow, which is normalised on the way."""
        of, latent, (table,) = self.of, self.of.latent, tables
        assert latent is not None
        length, dk = of.length, latent.plain + latent.rotary
        q = y
        if latent.queries:
            q = self._linear(y, f"{name}.q_down", latent.queries)
            q = self._norm(q, f"{name}.q_norm", narrow=True)
        q = self._linear(q, f"{name}.q_up", of.heads * dk)
        q = self._by_heads(q, name, of.heads, dk)
        q = self._op(name, "fused.rotary.part", (q, table), self.specs[q].shape)
        down = self._linear(y, f"{name}.kv_down", latent.keys + latent.rotary)
        sizes = (latent.keys, latent.rotary)
        parts = [((self.batch, length, size), of.dtype) for size in sizes]
        narrow, places = self._outputs(name, "split_with_sizes", (down,), parts, sizes, 2)
        kv = self._norm(narrow, f"{name}.kv_norm", narrow=True)
        kv = self._linear(kv, f"{name}.kv_up", of.heads * (latent.plain + latent.values))
        kv = self._by_heads(kv, name, of.heads, latent.plain + latent.values)
        heads = (self.batch, of.heads, length)
        made = [((*heads, dk), of.dtype), ((*heads, latent.values), of.dtype)]
        k, v = self._outputs(name, "fused.latent_keys", (kv, places, table), made)
        z = self._op(name, "fused.causal_attention", (q, k, v), (*heads, latent.values))
        flat = (self.batch, length, of.heads * latent.values)
        apart = (self.batch, length, of.heads, latent.values)
        z = self._op(name, "transpose.int", (z,), apart, 1, 2)
        return self._linear(self._op(name, "reshape", (z,), flat, flat), f"{name}.out", of.width)

    def _rotated(self, x: str, table: str, name: str) -> str:
        if not self.of.wide_rotary:
            kernel = "fused.rotary.in_steps" if self.of.scaled else "fused.rotary"
            kernel = kernel if self.of.fused else "mul.Tensor"
            return self._op(name, kernel, (x, table), self.specs[x].shape)
        x = self._cast(x, "float32", name)
        x = self._op(name, "mul.Tensor", (x, table), self.specs[x].shape)
        return self._cast(x, self.of.dtype, name)

    def _cast(self, x: str, dtype: str, name: str) -> str:
        keywords = (("dtype", Dtype(dtype)),)
        return self._op(name, "_to_copy", (x,), self.specs[x].shape, dtype=dtype, keywords=keywords)

    def _softmax(self, scores: str, name: str) -> str:
        kernel = "fused.causal_softmax" if self.of.fused else "softmax.int"
        return self._op(name, kernel, (scores,), self.specs[scores].shape, -1)

    def _projected(self, y: str, name: str) -> tuple[str, str, str]:
        of, d = self.of, self.head_width
        if of.kv_heads == of.heads:
            fused = self._linear(y, f"{name}.qkv", 3 * of.heads * d)
            shape = (*self.specs[y].shape[:-1], of.heads * d)
            parts = self._outputs(
                name, "split.Tensor", (fused,), [(shape, of.dtype)] * 3, of.heads * d, 2
            )
        else:
            sizes = (("q", of.heads), ("k", of.kv_heads), ("v", of.kv_heads))
            parts = tuple(self._linear(y, f"{name}.{part}", n * d) for part, n in sizes)
        counts = (of.heads, of.kv_heads, of.kv_heads)
        q, k, v = (self._by_heads(t, name, n, d) for t, n in zip(parts, counts, strict=True))
        return q, k, v

    def _by_heads(self, x: str, name: str, heads: int, width: int) -> str:
        apart = (self.batch, self.of.length, heads, width)
        x = self._op(name, "view", (x,), apart, apart)
        return self._op(name, "transpose.int", (x,), (apart[0], heads, apart[1], width), 1, 2)

    def _measured(self, logits: str, targets: str) -> None:
        """Nothing flows back from it."""
        flows, self.by_gradient[logits] = self.by_gradient[logits], False
        self._op("", "fused.metric", (logits, targets), (), dtype="float32")
        self.by_gradient[logits] = flows

    # ---- operators -----------------------------------------------------------------------------

    def _linear(self, x: str, name: str, out: int) -> str:
        shape = self.specs[x].shape
        weight = self._parameter(f"{name}.weight", (out, shape[-1]))
        read = [self._narrowed(x, name), self._narrowed_weight(weight, name)]
        if self.of.biased:
            read.append(self._parameter(f"{name}.bias", (out,)))
        return self._op(name, "linear", tuple(read), (*shape[:-1], out), dtype=self.of.dtype)

    def _narrowed(self, x: str, name: str) -> str:
        """As products take it; all that read it read one cast."""
        if self.of.products in (None, self.specs[x].dtype):
            return x
        if x not in self.narrow:
            to, shape = self.of.products, self.specs[x].shape
            cast = "fused.cast.twice" if "float4" in to else "fused.cast"
            self.narrow[x] = (
                self._op(name, cast, (x,), shape, dtype=to)
                if self.of.fused
                else self._cast(x, to, name)
            )
        return self.narrow[x]

    def _narrowed_weight(self, weight: str, name: str) -> str:
        return weight if self.of.engine else self._narrowed(weight, name)

    def _norm(self, x: str, name: str, *, narrow: bool = False) -> str:
        """``narrow``: only products read it."""
        sizes = self.specs[x].shape[-1:]
        weight = self._parameter(f"{name}.weight", sizes)
        shape, kernel = self.specs[x].shape, ".one_pass" if self.of.one_pass else ""
        if self.of.gated and self.of.fused:
            dtype = (narrow and self.of.engine and self.of.products) or self.of.dtype
            if self.of.cast_norms and dtype != self.of.dtype:
                kernel = ".then_cast_twice" if "float4" in dtype else ".then_cast"
            return self._op(name, f"fused.rms_norm{kernel}", (x, weight), shape, dtype=dtype)
        if self.of.gated:
            return self._call(name, "rms_norm", (x, weight), (Input(0), sizes, Input(1)))
        bias = (self._parameter(f"{name}.bias", sizes),) if self.of.biased else ()
        if self.of.fused and self.of.one_pass:
            return self._op(name, f"fused.layer_norm{kernel}", (x, weight, *bias), shape)
        shift = Input(2) if bias else None
        arguments = (Input(0), sizes, Input(1), shift, EPSILON, False)
        return self._call(name, "layer_norm", (x, weight, *bias), arguments)

    def _call(
        self, name: str, op: str, read: tuple[str, ...], arguments: tuple[object, ...]
    ) -> str:
        """An op whose arguments are not its inputs and then its sizes; as large as its input."""
        spec = self.specs[read[0]]
        return self._add(name, op, read, [(spec.shape, spec.dtype)], arguments, ())[0]

    def _dropped(self, x: str, name: str, kernel: str = "fused.dropout") -> str:
        if not self.of.dropout:
            return x
        spec = self.specs[x]
        made = [(spec.shape, spec.dtype), (spec.shape, "bool")]
        kernel = kernel if self.of.fused else "native_dropout"
        return self._outputs(name, kernel, (x,), made, DROPOUT, True)[0]

    def _op(
        self,
        name: str,
        op: str,
        read: tuple[str, ...],
        shape: tuple[int, ...],
        *more: object,
        dtype: str = "",
        keywords: tuple[tuple[str, object], ...] = (),
    ) -> str:
        """One output, of the dtype of the first input if not said."""
        arguments = (*map(Input, range(len(read))), *more)
        made = [(shape, dtype or self.specs[read[0]].dtype)]
        return self._add(name, op, read, made, arguments, keywords)[0]

    def _outputs(
        self,
        name: str,
        op: str,
        read: tuple[str, ...],
        made: list[tuple[tuple[int, ...], str]],
        *more: object,
    ) -> tuple[str, ...]:
        return self._add(name, op, read, made, (*map(Input, range(len(read))), *more), ())

    def _add(
        self,
        module: str,
        op: str,
        read: tuple[str, ...],
        made: list[tuple[tuple[int, ...], str]],
        arguments: tuple[object, ...],
        keywords: tuple[tuple[str, object], ...],
    ) -> tuple[str, ...]:
        full = op if op.startswith("fused.") else f"aten.{op}"
        full = full if full.count(".") == 2 else f"{full}.default"
        base = ".".join(filter(None, (module, full.split(".")[1].strip("_"))))
        count = self.names[base] = self.names.get(base, -1) + 1
        name = f"{base}_{count}" if count else base
        several = len(made) > 1
        outputs = tuple(f"{name}:{i}" if several else name for i in range(len(made)))
        flows = any(self.by_gradient[n] for n in read)
        for output, (shape, dtype) in zip(outputs, made, strict=True):
            self._tensor(output, shape, dtype, Role.ACTIVATION, flows and "float" in dtype)
        self.operators.append(Operator(name, full, read, outputs, arguments, keywords, module))
        return outputs

    # ---- tensors -------------------------------------------------------------------------------

    def _parameter(self, name: str, shape: tuple[int, ...]) -> str:
        return self._tensor(name, shape, self.of.dtype, Role.PARAMETER, True)

    def _given(self, name: str, shape: tuple[int, ...], dtype: str, role: Role) -> str:
        return self._tensor(name, shape, dtype, role, False)

    def _tensor(
        self, name: str, shape: tuple[int, ...], dtype: str, role: Role, flows: bool
    ) -> str:
        spec = TensorSpec(shape, dtype)
        self.tensors.append(Tensor(name, spec, role, flows))
        self.specs[name], self.by_gradient[name] = spec, flows
        return name

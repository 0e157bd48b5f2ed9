// Attention on CUDA: argument checks, dispatch on the dtype, launch (see ops_checks.h).
#include <torch/csrc/stable/library.h>

#include "ops_cache_checks.h"

namespace hf_fastpath {
namespace {

// One call of attn_decode_*: what the formats' checks share, and the launch.
struct Decode {
  Check check;
  const Tensor& query;
  Dtype dtype;
  int64_t batch, heads, dim, kv_heads, capacity;
  AttnDecodeArgs args = {};

  // k_data: (B, H_kv, capacity, ...).
  Decode(const char* op, const Tensor& query, const Tensor& k_data)
      : check{op}, query(query), dtype(check.float_dtype(query, "query")) {
    check.shape(query, {-1, -1, -1}, "query", "(B, H, D)");
    check.contiguous(query, "query");
    batch = query.size(0), heads = query.size(1), dim = query.size(2);
    check(dim >= 16 && dim <= kMaxKvDim && dim % 16 == 0, "takes head dimensions that are multiples of 16 up to ",
          kMaxKvDim, ", got ", dim);
    check(k_data.dim() >= 3, "keys must have shape (B, H_kv, capacity, ...), got ", k_data);
    kv_heads = k_data.size(1), capacity = k_data.size(2);
    check(kv_heads >= 1 && heads % kv_heads == 0, "the number of heads ", heads, " is not a multiple of H_kv ",
          kv_heads);
    check(capacity <= kMaxInt / 2 && capacity % 16 == 0, "takes capacities that are multiples of 16, got ", capacity);
    check(batch <= 65535 && heads <= 65535, "takes up to 65535 rows and heads");
    args.query = data(query);
    args.batch = static_cast<int>(batch), args.heads = static_cast<int>(heads);
    args.kv_heads = static_cast<int>(kv_heads), args.dim = static_cast<int>(dim);
    args.capacity = static_cast<int>(capacity);
  }

  // A tensor of the storage: its dtype, shape (B, H_kv, ...) and place.
  const void* stored(const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> sizes, const char* name,
                     const char* dtype_name, const char* meaning) const {
    check.dtype(t, dtype, name, dtype_name);
    check.shape(t, sizes, name, meaning);
    check.contiguous(t, name);
    check.aligned(t, 16, name);
    check.same_device(query, t, name);
    return data(t);
  }
  // One in the model's dtype.
  const void* full(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name, const char* meaning) const {
    return stored(t, query.scalar_type(), sizes, name, "of query's dtype", meaning);
  }

  void take_lengths(const Tensor& lengths) {
    check.dtype(lengths, ScalarType::Int, "lengths", "int32");
    check.shape(lengths, {batch, kv_heads}, "lengths", "(B, H_kv)");
    check.contiguous(lengths, "lengths");
    check.same_device(query, lengths, "lengths");
    args.lengths = data<int>(lengths);
    args.length_stride = 1;
  }
  void take_tickets(const std::optional<Tensor>& tickets) {
    if (!tickets) return;
    check.dtype(*tickets, ScalarType::Int, "tickets", "int32");
    check.shape(*tickets, {-1}, "tickets", "(n,)");
    check(tickets->size(0) >= batch * kv_heads, "tickets must have at least ", batch * kv_heads, " elements, got ",
          tickets->size(0));
    check.contiguous(*tickets, "tickets");
    check.same_device(query, *tickets, "tickets");
    args.tickets = static_cast<uint32_t*>(tickets->data_ptr());
  }
  void take_mask(const std::optional<Tensor>& mask) {
    if (!mask) return;
    check.dtype(*mask, ScalarType::Bool, "mask", "bool");
    check.shape(*mask, {batch, -1}, "mask", "(B, n)");
    check(mask->stride(1) == 1 || mask->size(1) <= 1, "mask must be contiguous in its last dimension");
    check.same_device(query, *mask, "mask");
    args.mask = data<uint8_t>(mask);
    args.mask_row_stride = mask->stride(0);
    args.mask_columns = mask->size(1);
  }
  void take_options(int64_t window, double softcap, const std::optional<Tensor>& sinks) {
    check(window >= 0 && window <= kMaxInt, "window must be 0 (none) or a number of tokens, got ", window);
    check(softcap >= 0, "softcap must be 0 (none) or positive, got ", softcap);
    args.window = static_cast<int>(window);
    args.softcap = static_cast<float>(softcap);
    if (!sinks) return;
    check.dtype(*sinks, ScalarType::Float, "sinks", "float32");
    check.shape(*sinks, {heads}, "sinks", "(H,)");
    check.contiguous(*sinks, "sinks");
    check.same_device(query, *sinks, "sinks");
    args.sinks = data<float>(sinks);
  }

  // launcher(args, dtype, stream)
  template <typename Launcher>
  Tensor run(double scaling, int64_t (*scratch_floats)(const AttnDecodeArgs&), const Launcher& launcher) {
    args.scaling = static_cast<float>(scaling);
    const Launch launch(query);
    Tensor out = launch.empty({batch, heads, dim}, query.scalar_type());
    if (query.numel() == 0) return out;
    const int64_t floats = scratch_floats(args), own = args.tickets || !floats ? 0 : batch * kv_heads;
    const Tensor scratch = launch.empty({floats + own}, ScalarType::Float);
    args.out = out.data_ptr();
    args.scratch = static_cast<float*>(scratch.data_ptr());
    if (own) {
      args.tickets = reinterpret_cast<uint32_t*>(args.scratch + floats);
      check.launched(cudaMemsetAsync(args.tickets, 0, own * sizeof(uint32_t), launch.stream()));
    }
    check.launched(launcher(args, dtype, launch.stream()));
    return out;
  }
};

void take_static(Decode& d, const Tensor& k, const Tensor& v, const char* k_name, const char* v_name) {
  constexpr auto kShape = "(B, H_kv, capacity, D) with query's B and D";
  d.args.keys.data = d.full(k, {d.batch, d.kv_heads, d.capacity, d.dim}, k_name, kShape);
  d.args.values.data = d.full(v, {d.batch, d.kv_heads, d.capacity, d.dim}, v_name, kShape);
}

Tensor attn_decode_static(const Tensor& query, const Tensor& k, const Tensor& v, const Tensor& lengths,
                          const std::optional<Tensor>& tickets, const std::optional<Tensor>& mask, double scaling,
                          int64_t window, double softcap, const std::optional<Tensor>& sinks) {
  Decode d("attn_decode_static", query, k);
  take_static(d, k, v, "k", "v");
  d.take_lengths(lengths);
  d.take_tickets(tickets);
  d.take_mask(mask);
  d.take_options(window, softcap, sinks);
  return d.run(scaling, attn_decode_static_scratch_floats, launch_attn_decode_static);
}

// Codes of a byte a channel, with a scale for every `scale_tokens`.
void take_bytes(Decode& d, KvSide& side, const Tensor& codes, const Tensor& scale, ScalarType dtype,
                const char* dtype_name, int64_t scale_tokens, const char* names[2]) {
  side.data = d.stored(codes, dtype, {d.batch, d.kv_heads, d.capacity, d.dim}, names[0], dtype_name,
                       "(B, H_kv, capacity, D) with query's B and D");
  const bool each = scale_tokens == 1;
  side.scale =
      d.stored(scale, each ? ScalarType::Half : ScalarType::Float, {d.batch, d.kv_heads, d.capacity / scale_tokens},
               names[1], each ? "float16" : "float32", each ? "(B, H_kv, capacity)" : "(B, H_kv, capacity / 64)");
}
const char* k_names[2] = {"k_data", "k_scale"};
const char* v_names[2] = {"v_data", "v_scale"};

Tensor attn_decode_int8(const Tensor& query, const Tensor& k_data, const Tensor& k_scale, const Tensor& v_data,
                        const Tensor& v_scale, const Tensor& lengths, const std::optional<Tensor>& tickets,
                        const std::optional<Tensor>& mask, double scaling, int64_t window, double softcap,
                        const std::optional<Tensor>& sinks) {
  Decode d("attn_decode_int8", query, k_data);
  take_bytes(d, d.args.keys, k_data, k_scale, ScalarType::Char, "int8", 1, k_names);
  take_bytes(d, d.args.values, v_data, v_scale, ScalarType::Char, "int8", 1, v_names);
  d.take_lengths(lengths);
  d.take_tickets(tickets);
  d.take_mask(mask);
  d.take_options(window, softcap, sinks);
  return d.run(scaling, attn_decode_int8_scratch_floats, launch_attn_decode_int8);
}

// One call of attn_step_*: the new tokens, and Decode over the storage that they go to.
struct Step {
  NewTokens tokens;
  Tensor ready;  // (B, H, D), where the transformed queries go if they are stored at all
  Decode decode;

  Step(const NewTokens& n, const std::optional<Tensor>& query, const Tensor& k_data)
      : tokens(n), ready(checked_queries(n, *query)), decode(n.check.op, ready, k_data) {
    n.check(decode.kv_heads == n.kv_heads(), "the cache must have key's H_kv ", n.kv_heads(), ", got ",
            decode.kv_heads);
  }
  static Tensor checked_queries(const NewTokens& n, const Tensor& query) {
    n.checked_inputs();
    n.check(n.tokens() == 1, "takes one new token a row, got ", n.tokens());
    return Launch(query).empty({query.size(0), query.size(1), query.size(3)}, query.scalar_type());
  }

  template <typename Storage>
  Tensor run(double scaling, const Tensor& lengths, const Storage& storage,
             int64_t (*scratch_floats)(const AttnDecodeArgs&),
             cudaError_t (*launcher)(const AttnDecodeArgs&, const KvNewTokens&, const Storage&, Dtype, cudaStream_t)) {
    return decode.run(scaling, scratch_floats, [&](const AttnDecodeArgs& args, Dtype dtype, cudaStream_t stream) {
      KvNewTokens n = tokens.args(decode.capacity, lengths);
      n.query_out = ready.data_ptr();
      return launcher(args, n, storage, dtype, stream);
    });
  }
};

Tensor attn_step_static(const Tensor& query, const Tensor& key, const Tensor& value,
                        const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool rotate,
                        const Tensor& keys, const Tensor& values, const Tensor& lengths,
                        const std::optional<Tensor>& tickets, const std::optional<Tensor>& mask, double scaling) {
  const std::optional<Tensor> queries(query), nothing;
  Step s({{"attn_step_static"}, queries, key, value, q_norm, k_norm, eps, cos, sin, rotate, nothing}, queries, keys);
  take_static(s.decode, keys, values, "keys", "values");
  s.decode.take_lengths(lengths);
  s.decode.take_tickets(tickets);
  s.decode.take_mask(mask);
  const KvStaticStorage storage{keys.data_ptr(), values.data_ptr()};
  return s.run(scaling, lengths, storage, attn_decode_static_scratch_floats, launch_attn_step_static);
}

Tensor attn_step_int8(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& q_norm,
                      const std::optional<Tensor>& k_norm, double eps, const std::optional<Tensor>& cos,
                      const std::optional<Tensor>& sin, bool rotate, const Tensor& k_data, const Tensor& k_scale,
                      const Tensor& v_data, const Tensor& v_scale, const Tensor& lengths,
                      const std::optional<Tensor>& tickets, const std::optional<Tensor>& mask, double scaling) {
  const std::optional<Tensor> queries(query), nothing;
  Step s({{"attn_step_int8"}, queries, key, value, q_norm, k_norm, eps, cos, sin, rotate, nothing}, queries, k_data);
  take_bytes(s.decode, s.decode.args.keys, k_data, k_scale, ScalarType::Char, "int8", 1, k_names);
  take_bytes(s.decode, s.decode.args.values, v_data, v_scale, ScalarType::Char, "int8", 1, v_names);
  s.decode.take_lengths(lengths);
  s.decode.take_tickets(tickets);
  s.decode.take_mask(mask);
  const KvInt8Storage storage{{k_data.data_ptr(), k_scale.data_ptr()}, {v_data.data_ptr(), v_scale.data_ptr()}};
  return s.run(scaling, lengths, storage, attn_decode_int8_scratch_floats, launch_attn_step_int8);
}

Tensor attn_decode_fp8(const Tensor& query, const Tensor& k_data, const Tensor& k_scale, const Tensor& k_tail,
                       const Tensor& v_data, const Tensor& v_scale, const Tensor& v_tail, const Tensor& lengths,
                       const std::optional<Tensor>& tickets, const std::optional<Tensor>& mask, double scaling,
                       int64_t window, double softcap, const std::optional<Tensor>& sinks) {
  constexpr int64_t kGroup = 64;
  Decode d("attn_decode_fp8", query, k_data);
  d.check(d.capacity % kGroup == 0, "takes capacities that are multiples of 64, got ", d.capacity);
  take_bytes(d, d.args.keys, k_data, k_scale, ScalarType::Float8_e4m3fn, "float8_e4m3fn", kGroup, k_names);
  take_bytes(d, d.args.values, v_data, v_scale, ScalarType::Float8_e4m3fn, "float8_e4m3fn", kGroup, v_names);
  d.args.keys.tail = d.full(k_tail, {d.batch, d.kv_heads, kGroup, d.dim}, "k_tail", "(B, H_kv, 64, D)");
  d.args.values.tail = d.full(v_tail, {d.batch, d.kv_heads, kGroup, d.dim}, "v_tail", "(B, H_kv, 64, D)");
  d.args.group_tokens = kGroup;
  d.take_lengths(lengths);
  d.take_tickets(tickets);
  d.take_mask(mask);
  d.take_options(window, softcap, sinks);
  return d.run(scaling, attn_decode_fp8_scratch_floats, launch_attn_decode_fp8);
}

Tensor attn_decode_int4(const Tensor& query, const Tensor& k_data, const Tensor& k_params, const Tensor& k_tail,
                        const Tensor& k_sinks, const Tensor& v_data, const Tensor& v_params, const Tensor& v_tail,
                        const Tensor& v_sinks, const Tensor& lengths, const std::optional<Tensor>& tickets,
                        const std::optional<Tensor>& mask, double scaling, int64_t window, double softcap,
                        const std::optional<Tensor>& sinks) {
  Decode d("attn_decode_int4", query, k_data);
  d.check(k_tail.dim() == 4 && (k_tail.size(2) == 32 || k_tail.size(2) == 64),
          "k_tail must have shape (B, H_kv, 32 or 64, D), got ", k_tail);
  const int64_t group = k_tail.size(2), groups = d.capacity / group, front = k_sinks.dim() == 4 ? k_sinks.size(2) : 0;
  d.check(d.capacity % group == 0, "takes capacities that are multiples of the group's ", group, " tokens, got ",
          d.capacity);
  int64_t parts = (d.dim + 63) / 64;
  while (d.dim % parts) ++parts;
  d.check(d.dim / parts % 8 == 0, "takes head dimensions whose parts of up to 64 channels are multiples of 8, got ",
          d.dim);
  const int64_t rows = d.batch, pairs = d.kv_heads;
  d.args.keys = {d.stored(k_data, ScalarType::Byte, {rows, pairs, d.capacity, d.dim / 2}, "k_data", "uint8",
                          "(B, H_kv, capacity, D / 2)"),
                 d.stored(k_params, ScalarType::Half, {rows, pairs, groups, 2, d.dim}, "k_params", "float16",
                          "(B, H_kv, capacity / G, 2, D)"),
                 d.full(k_tail, {rows, pairs, group, d.dim}, "k_tail", "(B, H_kv, G, D)"),
                 d.full(k_sinks, {rows, pairs, front, d.dim}, "k_sinks", "(B, H_kv, S, D)")};
  d.args.values = {d.stored(v_data, ScalarType::Byte, {rows, pairs, d.capacity / 8, d.dim, 4}, "v_data", "uint8",
                            "(B, H_kv, capacity / 8, D, 4)"),
                   d.stored(v_params, ScalarType::Half, {rows, pairs, groups, 2, parts, group}, "v_params", "float16",
                            "(B, H_kv, capacity / G, 2, parts, G)"),
                   d.full(v_tail, {rows, pairs, group, d.dim}, "v_tail", "(B, H_kv, G, D)"),
                   d.full(v_sinks, {rows, pairs, front, d.dim}, "v_sinks", "(B, H_kv, S, D)")};
  d.args.group_tokens = static_cast<int>(group);
  d.args.front_tokens = static_cast<int>(front);
  d.take_lengths(lengths);
  d.take_tickets(tickets);
  d.take_mask(mask);
  d.take_options(window, softcap, sinks);
  return d.run(scaling, attn_decode_int4_scratch_floats, launch_attn_decode_int4);
}

Tensor attn_decode_h2o(const Tensor& query, const Tensor& k_data, const Tensor& k_scale, const Tensor& v_data,
                       const Tensor& v_scale, const Tensor& scores, const Tensor& positions, const Tensor& counts,
                       const std::optional<Tensor>& tickets, const std::optional<Tensor>& mask, double scaling) {
  Decode d("attn_decode_h2o", query, k_data);
  take_bytes(d, d.args.keys, k_data, k_scale, ScalarType::Float8_e4m3fn, "float8_e4m3fn", 1, k_names);
  take_bytes(d, d.args.values, v_data, v_scale, ScalarType::Float8_e4m3fn, "float8_e4m3fn", 1, v_names);
  const std::initializer_list<int64_t> slots = {d.batch, d.kv_heads, d.capacity};
  d.stored(scores, ScalarType::Float, slots, "scores", "float32", "(B, H_kv, N)");
  d.args.positions =
      static_cast<const int*>(d.stored(positions, ScalarType::Int, slots, "positions", "int32", "(B, H_kv, N)"));
  d.check.dtype(counts, ScalarType::Int, "counts", "int32");
  d.check.shape(counts, {d.batch, d.kv_heads, 2}, "counts", "(B, H_kv, 2)");
  d.check.contiguous(counts, "counts");
  d.check.same_device(query, counts, "counts");
  d.args.lengths = data<int>(counts);
  d.args.length_stride = 2;
  d.take_tickets(tickets);
  d.take_mask(mask);
  if (query.numel() == 0) return d.run(scaling, attn_decode_h2o_scratch_floats, launch_attn_decode_h2o);

  const Launch launch(query);
  const Tensor slot_scores = launch.empty({d.batch, d.heads, d.capacity}, ScalarType::Float);
  const Tensor totals = launch.empty({d.batch, d.heads, 2}, ScalarType::Float);
  d.args.slot_scores = static_cast<float*>(slot_scores.data_ptr());
  d.args.totals = static_cast<float2*>(totals.data_ptr());
  Tensor out = d.run(scaling, attn_decode_h2o_scratch_floats, launch_attn_decode_h2o);
  const H2OCountArgs count{d.args.slot_scores,
                           d.args.totals,
                           d.args.mask,
                           d.args.mask_row_stride,
                           d.args.mask_columns,
                           static_cast<float*>(scores.data_ptr()),
                           static_cast<int*>(counts.data_ptr()),
                           d.args.batch,
                           d.args.heads,
                           d.args.kv_heads,
                           d.args.capacity};
  d.check.launched(launch_h2o_count(count, launch.stream()));
  return out;
}

Tensor attn_received(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& positions,
                     const std::optional<Tensor>& mask, int64_t start, double scaling) {
  constexpr Check check{"attn_received"};
  const Dtype dtype = check.float_dtype(query, "query");
  check.shape(query, {-1, -1, -1, -1}, "query", "(B, H, q, D)");
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2), dim = query.size(3);
  check(dim % 8 == 0 && dim >= 8 && dim <= kMaxKvDim, "takes head dimensions that are multiples of 8 up to ", kMaxKvDim,
        ", got ", dim);
  check(key.scalar_type() == query.scalar_type(), "query and key must have the same dtype");
  check.shape(key, {batch, -1, -1, dim}, "key", "(B, H_kv, n, D) with query's B and D");
  const int64_t kv_heads = key.size(1), keys = key.size(2);
  check(kv_heads >= 1 && heads % kv_heads == 0, "the number of heads ", heads, " is not a multiple of H_kv ", kv_heads);
  check(keys >= tokens && keys <= kMaxInt / 2, "key must have at least the queries' ", tokens, " tokens, got ", keys);
  check.dtype(lse, ScalarType::Float, "lse", "float32");
  check.shape(lse, {batch, heads, tokens}, "lse", "(B, H, q)");
  check.dtype(positions, ScalarType::Int, "positions", "int32");
  check.shape(positions, {batch, kv_heads, -1}, "positions", "(B, H_kv, >= n - q)");
  check(positions.size(2) >= keys - tokens, "positions must have at least ", keys - tokens, " columns, got ",
        positions.size(2));
  check(start >= keys - tokens, "start ", start, " is less than the ", keys - tokens, " older keys");
  if (mask) {
    check.dtype(*mask, ScalarType::Bool, "mask", "bool");
    check.shape(*mask, {batch, tokens, -1}, "mask", "(B, q, >= start + q)");
    check(mask->size(2) >= start + tokens, "mask must have at least ", start + tokens, " columns, got ", mask->size(2));
    check(mask->stride(2) == 1 || mask->size(2) == 1, "mask must be contiguous in its last dimension");
    check.same_device(query, *mask, "mask");
  }
  const std::pair<const Tensor*, const char*> all[] = {
      {&query, "query"}, {&key, "key"}, {&lse, "lse"}, {&positions, "positions"}};
  for (const auto& [t, name] : all) {
    check.contiguous(*t, name);
    check.same_device(query, *t, name);
  }
  check.aligned(query, 16, "query");
  check.aligned(key, 16, "key");
  check(batch <= 65535 && heads <= 65535, "takes up to 65535 rows and heads");
  const Launch launch(query);
  Tensor out = launch.empty({batch, heads, keys}, ScalarType::Float);
  if (out.numel() == 0) return out;
  const AttnReceivedArgs args{data(query),
                              data(key),
                              data<float>(lse),
                              tokens,
                              data<int32_t>(positions),
                              positions.size(2),
                              data<uint8_t>(mask),
                              mask ? mask->stride(0) : 0,
                              mask ? mask->stride(1) : 0,
                              start,
                              static_cast<float*>(out.data_ptr()),
                              static_cast<int>(batch),
                              static_cast<int>(heads),
                              static_cast<int>(kv_heads),
                              static_cast<int>(tokens),
                              static_cast<int>(keys),
                              static_cast<int>(keys - tokens),
                              static_cast<int>(dim),
                              static_cast<float>(scaling)};
  check.launched(launch_attn_received(args, dtype, launch.stream()));
  return out;
}

}  // namespace
}  // namespace hf_fastpath

STABLE_TORCH_LIBRARY_IMPL(hf_fastpath, CUDA, m) {
  m.impl("attn_received", TORCH_BOX(&hf_fastpath::attn_received));
  m.impl("attn_decode_static", TORCH_BOX(&hf_fastpath::attn_decode_static));
  m.impl("attn_decode_int8", TORCH_BOX(&hf_fastpath::attn_decode_int8));
  m.impl("attn_decode_fp8", TORCH_BOX(&hf_fastpath::attn_decode_fp8));
  m.impl("attn_decode_int4", TORCH_BOX(&hf_fastpath::attn_decode_int4));
  m.impl("attn_step_static", TORCH_BOX(&hf_fastpath::attn_step_static));
  m.impl("attn_step_int8", TORCH_BOX(&hf_fastpath::attn_step_int8));
  m.impl("attn_decode_h2o", TORCH_BOX(&hf_fastpath::attn_decode_h2o));
}

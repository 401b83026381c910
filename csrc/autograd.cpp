// The autograd nodes of the ops that a step calls most often. In Python a node costs 0.1 to 0.2 ms between two GEMMs,
// which leave nothing of the interpreter in the caches; here it is some microseconds.
//
// Each is the twin of the torch.autograd.Function in bertfast/ops/<op>.py, which says what is computed, and which runs
// where this is not loaded, under torch.compile and for fp16 on CPUs (bertfast/ops/_define.py, `node`). What they call
// goes through the dispatcher, so that they serve every device.
#include <ATen/ATen.h>
#include <c10/util/strides.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace bertfast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

// The op `name` of ours, looked up once.
#define OP(name, ...)                                                                                        \
  [] {                                                                                                       \
    static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("bertfast::" name, "")         \
                                   .typed<__VA_ARGS__>();                                                    \
    return handle;                                                                                           \
  }()

Tensor multiply(bool own, const Tensor& a, const Tensor& b, const Optional& bias, bool transpose_a, bool transpose_b) {
  if (own)
    return OP("gemm", Tensor(const Tensor&, const Tensor&, const Optional&, bool, bool))
        .call(a, b, bias, transpose_a, transpose_b);
  const Tensor left = transpose_a ? a.t() : a, right = transpose_b ? b.t() : b;
  return bias ? at::addmm(*bias, left, right) : at::mm(left, right);
}

Tensor bias_gelu_fwd(const Tensor& x, const Tensor& bias) {
  return OP("bias_gelu_fwd", Tensor(const Tensor&, const Tensor&)).call(x, bias);
}

// The tensors one under another, as a view where memory already has them so.
Tensor joined(at::TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), "linear: there are no weights");
  const Tensor& first = tensors[0];
  if (tensors.size() == 1) return first;
  const auto* end = static_cast<const char*>(first.const_data_ptr());
  int64_t rows = 0;
  for (const Tensor& t : tensors) {
    if (t.const_data_ptr() != end || !t.is_contiguous() || t.scalar_type() != first.scalar_type()) return at::cat(tensors);
    end += t.nbytes();
    rows += t.size(0);
  }
  const auto& storage = first.storage();  // else neighbours by chance, in storages of their own
  if (end > static_cast<const char*>(storage.data()) + storage.nbytes()) return at::cat(tensors);
  auto sizes = first.sizes().vec();
  sizes[0] = rows;
  return first.as_strided(sizes, c10::contiguous_strides(sizes));  // its own may say anything of a single row
}

// Undefined where None was saved.
Optional given(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }
Tensor saved(const Optional& t) { return t.value_or(Tensor()); }

// What every backward begins with: _define.once_differentiable's twin, since PyTorch's own misses constant gradients.
variable_list saved_variables(AutogradContext* ctx) {
  TORCH_CHECK(!at::GradMode::is_enabled(), "bertfast's ops have no second derivative: create_graph=True is not for them");
  return ctx->get_saved_variables();
}

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, at::TensorList weights, at::TensorList biases, bool own) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list kept = {x};
    kept.insert(kept.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["biases"] = int64_t(biases.size());
    ctx->saved_data["own"] = own;
    return multiply(own, x, joined(weights), biases.empty() ? Optional() : joined(biases), false, true);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list kept = saved_variables(ctx);
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor& x = kept[0];
    const auto weights = at::TensorList(kept).slice(1);
    const int64_t n = weights.size(), n_biases = ctx->saved_data["biases"].toInt();
    const bool own = ctx->saved_data["own"].toBool();
    const Tensor dy = own ? dys[0].contiguous() : dys[0];  // once for both products
    variable_list gradients(2 + n + n_biases);
    if (ctx->needs_input_grad(0)) gradients[0] = multiply(own, dy, joined(weights), {}, false, false);
    bool learns = false;
    for (int64_t i = 1; i <= n; i++) learns |= ctx->needs_input_grad(i);
    if (learns) {
      const auto parts = multiply(own, dy, x, {}, true, false).chunk(n);
      std::copy(parts.begin(), parts.end(), gradients.begin() + 1);
    }
    if (n_biases) {
      const auto parts = dy.sum(0).chunk(n);
      std::copy(parts.begin(), parts.end(), gradients.begin() + 1 + n);
    }
    return gradients;
  }
};

struct GeluLinear : torch::autograd::Function<GeluLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& bias, const Tensor& weight, bool own) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, bias, weight});
    ctx->saved_data["own"] = own;
    return multiply(own, bias_gelu_fwd(x, bias), weight, {}, false, true);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list kept = saved_variables(ctx);
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor &x = kept[0], &bias = kept[1], &weight = kept[2];
    const bool own = ctx->saved_data["own"].toBool();
    const Tensor dy = own ? dys[0].contiguous() : dys[0];
    const Tensor dweight = multiply(own, dy, bias_gelu_fwd(x, bias), {}, true, false);
    auto [dx, dbias] = OP("bias_gelu_bwd", std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&))
                           .call(multiply(own, dy, weight, {}, false, false), x, bias);
    return {dx, dbias, dweight, Tensor()};
  }
};

struct AddLayerNorm : torch::autograd::Function<AddLayerNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& bias, const Tensor& residual,
                        const Tensor& weight, const Tensor& ln_bias, double eps, double p, const Optional& seed,
                        const Optional& row_key, int64_t stream) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, z, mean, rstd] =
        OP("add_layer_norm_fwd", std::tuple<Tensor, Tensor, Tensor, Tensor>(
                                     const Tensor&, const Optional&, const Tensor&, const Tensor&, const Tensor&, double,
                                     double, const Optional&, const Optional&, int64_t))
            .call(x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream);
    ctx->save_for_backward({z, mean, rstd, weight, saved(seed), saved(row_key)});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["p"] = p;
    ctx->saved_data["stream"] = stream;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list kept = saved_variables(ctx);
    at::AutoDispatchBelowADInplaceOrView below;
    const double p = ctx->saved_data["p"].toDouble();
    auto [dz, dx, dbias, dweight, dln_bias] =
        OP("add_layer_norm_bwd",
           std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                              const Tensor&, double, const Optional&, const Optional&,
                                                              int64_t))
            .call(dys[0], kept[0], kept[1], kept[2], kept[3], p, given(kept[4]), given(kept[5]),
                  ctx->saved_data["stream"].toInt());
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    variable_list gradients(10);
    gradients[0] = p > 0 ? dx : dz;
    if (has_bias) gradients[1] = dbias;
    gradients[2] = dz;
    gradients[3] = dweight;
    gradients[4] = dln_bias;
    return gradients;
  }
};

struct AttentionPacked : torch::autograd::Function<AttentionPacked> {
  static Tensor forward(AutogradContext* ctx, const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                        double scale, int64_t mask_mode, const Optional& prefix_lens, double p, const Optional& seed,
                        const Optional& row_key, int64_t stream) {
    at::AutoDispatchBelowADInplaceOrView below;
    TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.size(1) == 3, "qkv must be (T, 3, heads, head_dim), got ", qkv.sizes());
    const auto parts = qkv.unbind(1);
    auto [out, lse] =
        OP("attention_fwd", std::tuple<Tensor, Tensor>(
                                const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                int64_t, double, int64_t, const Optional&, double, const Optional&, const Optional&,
                                int64_t))
            .call(parts[0], parts[1], parts[2], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, mask_mode,
                  prefix_lens, p, seed, row_key, stream);
    ctx->save_for_backward({qkv, out, lse, cu_seqlens, saved(prefix_lens), saved(seed), saved(row_key)});
    ctx->saved_data["constants"] = c10::List<double>({double(max_seqlen), scale, double(mask_mode), p, double(stream)});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const variable_list kept = saved_variables(ctx);
    at::AutoDispatchBelowADInplaceOrView below;
    const auto parts = kept[0].unbind(1);
    const auto constants = ctx->saved_data["constants"].toDoubleVector();
    variable_list gradients(10);
    gradients[0] =
        OP("attention_packed_bwd",
           Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const Tensor&, int64_t, int64_t, double, int64_t, const Optional&, double, const Optional&,
                  const Optional&, int64_t))
            .call(dys[0], parts[0], parts[1], parts[2], kept[1], kept[2], kept[3], kept[3], int64_t(constants[0]),
                  int64_t(constants[0]), constants[1], int64_t(constants[2]), given(kept[4]), constants[3],
                  given(kept[5]), given(kept[6]), int64_t(constants[4]));
    return gradients;
  }
};

}  // namespace
}  // namespace bertfast

TORCH_LIBRARY_FRAGMENT(bertfast, m) {
  using namespace bertfast;
  m.def("linear(Tensor x, Tensor[] weights, Tensor[] biases, bool own) -> Tensor",
        [](const Tensor& x, at::TensorList weights, at::TensorList biases, bool own) {
          return Linear::apply(x, weights, biases, own);
        });
  m.def("gelu_linear(Tensor x, Tensor bias, Tensor weight, bool own) -> Tensor",
        [](const Tensor& x, const Tensor& bias, const Tensor& weight, bool own) {
          return GeluLinear::apply(x, bias, weight, own);
        });
  m.def("add_layer_norm(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor ln_bias, float eps, float p, "
        "Tensor? seed, Tensor? row_key, int stream) -> Tensor",
        [](const Tensor& x, const Optional& bias, const Tensor& residual, const Tensor& weight, const Tensor& ln_bias,
           double eps, double p, const Optional& seed, const Optional& row_key, int64_t stream) {
          return AddLayerNorm::apply(x, bias, residual, weight, ln_bias, eps, p, seed, row_key, stream);
        });
  m.def("attention_packed(Tensor qkv, Tensor cu_seqlens, int max_seqlen, float scale, int mask_mode, "
        "Tensor? prefix_lens, float p, Tensor? seed, Tensor? row_key, int stream) -> Tensor",
        [](const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen, double scale, int64_t mask_mode,
           const Optional& prefix_lens, double p, const Optional& seed, const Optional& row_key, int64_t stream) {
          return AttentionPacked::apply(qkv, cu_seqlens, max_seqlen, scale, mask_mode, prefix_lens, p, seed, row_key,
                                        stream);
        });
}

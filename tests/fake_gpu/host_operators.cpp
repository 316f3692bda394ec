// Has torch's CUDA operators computed by its CPU kernels. Device memory is host memory here (cuda_runtime.c), so an operator's
// tensors are looked at as CPU tensors over the same bytes, and the CPU's kernel is called. Allocator, storages, views, streams and
// autograd stay torch's own CUDA code. Loaded by startup.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAFunctions.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <cstring>
#include <set>
#include <unordered_map>

using at::Tensor;
using c10::IValue;
using OptionalTensor = c10::optional<Tensor>;

// The CPU tensors of one call, and the CUDA tensors that they stand for.
class Aliases {
public:
    c10::optional<at::Device> device;

    Tensor on_host(const Tensor &tensor, bool is_output) {
        if (!tensor.defined() || !tensor.is_cuda()) return tensor;
        device = tensor.device();
        auto options = tensor.options().device(at::kCPU);
        // An empty output is resized by the operator, which memory of somebody else cannot be.
        bool grows = is_output && tensor.numel() == 0;
        void *bytes = tensor.numel() ? tensor.data_ptr() : static_cast<void *>(this);
        Tensor alias = grows ? at::empty({0}, options)
                             : at::from_blob(bytes, tensor.sizes(), tensor.strides(), options.requires_grad(false));
        if (grows) grown_.emplace_back(alias, tensor);
        if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
        originals_[alias.unsafeGetTensorImpl()] = tensor;
        aliases_.push_back(alias);
        return alias;
    }

    // What of the device a result is: an argument itself, a view of one, or new memory with its contents.
    Tensor on_device(const Tensor &result) {
        if (!result.defined() || !device || result.is_cuda()) return result;
        if (auto same = originals_.find(result.unsafeGetTensorImpl()); same != originals_.end()) return same->second;
        for (const Tensor &alias : aliases_)
            if (result.has_storage() && alias.numel() && result.storage().data() == alias.storage().data()) {
                Tensor original = originals_[alias.unsafeGetTensorImpl()];
                int64_t offset = original.storage_offset() + result.storage_offset();
                return original.as_strided(result.sizes(), result.strides(), offset);
            }
        Tensor dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
        Tensor copy = at::empty_strided(dense.sizes(), dense.strides(), dense.options().device(*device));
        if (dense.numel()) std::memcpy(copy.data_ptr(), dense.data_ptr(), dense.numel() * dense.element_size());
        return copy;
    }

    void fill_outputs_that_grew() {
        for (auto &[alias, original] : grown_) {
            original.resize_(alias.sizes());
            Tensor dense = alias.contiguous();
            if (dense.numel()) std::memcpy(original.data_ptr(), dense.data_ptr(), dense.numel() * dense.element_size());
        }
    }

private:
    std::unordered_map<const at::TensorImpl *, Tensor> originals_;
    std::vector<std::pair<Tensor, Tensor>> grown_;
    std::vector<Tensor> aliases_;
};

template <typename Element, typename List> c10::List<Element> each(const List &tensors, const std::function<Element(Element)> &change) {
    c10::List<Element> result;
    for (auto &&tensor : tensors) result.push_back(change(tensor));
    return result;
}

static IValue argument_on_host(Aliases &aliases, const IValue &value, bool is_output) {
    auto host = [&](Tensor tensor) { return aliases.on_host(tensor, is_output); };
    auto host_or_none = [&](OptionalTensor tensor) { return tensor ? OptionalTensor(host(*tensor)) : tensor; };
    if (value.isTensor()) return host(value.toTensor());
    if (value.isTensorList()) return each<Tensor>(value.toTensorVector(), host);
    if (value.isOptionalTensorList()) return each<OptionalTensor>(value.toOptionalTensorVector(), host_or_none);
    if (value.isDevice() && value.toDevice().is_cuda()) return at::Device(at::kCPU);
    if (value.isGenerator()) return IValue(); // a CUDA generator: the CPU's own one draws
    return value;
}

static void compute_on_host(const c10::OperatorHandle &op, c10::DispatchKeySet, torch::jit::Stack *stack) {
    const auto &arguments = op.schema().arguments();
    std::vector<IValue> values(stack->end() - arguments.size(), stack->end());
    torch::jit::drop(*stack, arguments.size());
    Aliases aliases;
    c10::optional<at::Device> asked_for; // by a factory, which has no tensor that says where
    torch::jit::Stack inner;
    for (size_t i = 0; i < values.size(); i++) {
        if (values[i].isDevice() && values[i].toDevice().is_cuda()) asked_for = values[i].toDevice();
        inner.push_back(argument_on_host(aliases, values[i], arguments[i].is_out()));
    }
    if (!aliases.device) aliases.device = asked_for;
    op.callBoxed(&inner);
    aliases.fill_outputs_that_grew();
    auto device = [&](Tensor tensor) { return aliases.on_device(tensor); };
    for (const IValue &value : inner) {
        if (value.isTensor()) stack->push_back(device(value.toTensor()));
        else if (value.isTensorList()) stack->push_back(each<Tensor>(value.toTensorVector(), device));
        else stack->push_back(value);
    }
}

// Operators that the boxed function above does not fit

static Tensor &copy_(Tensor &self, const Tensor &source, bool) {
    Aliases aliases;
    Tensor from = aliases.on_host(source, false);
    aliases.on_host(self, false).copy_(from);
    return self;
}

// A product of half-precision matrices with a float32 result, which the CPU lacks; what CUDA refuses is refused.
static Tensor mm_dtype(const Tensor &a, const Tensor &b, at::ScalarType type) {
    bool halves = a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf;
    TORCH_CHECK(a.scalar_type() == b.scalar_type() && (type == a.scalar_type() || (type == at::kFloat && halves)),
                "mm.dtype: out_dtype must be that of the inputs, or float32 for half types");
    return at::mm(a.to(type), b.to(type));
}

static int64_t fused_sdp_choice(const Tensor &, const Tensor &, const Tensor &, const OptionalTensor &, double, bool,
                                c10::optional<double>, bool) {
    return 0; // the one of plain operators
}

static std::tuple<Tensor, Tensor> rms_norm(const Tensor &x, at::IntArrayRef, const OptionalTensor &weight, c10::optional<double> eps) {
    Tensor wide = x.to(at::kFloat), scale = at::rsqrt(wide.pow(2).mean(-1, true) + eps.value_or(1.1920929e-07)), y = wide * scale;
    if (weight && weight->defined()) y = y * weight->to(at::kFloat);
    return {y.to(x.scalar_type()), scale};
}
static std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor &grad, const Tensor &x, at::IntArrayRef, const Tensor &scale,
                                                    const OptionalTensor &weight, std::array<bool, 2>) {
    Tensor wide = grad.to(at::kFloat), normal = x.to(at::kFloat) * scale, of_weight = (wide * normal).reshape({-1, x.size(-1)}).sum(0);
    bool weighted = weight && weight->defined();
    if (weighted) wide = wide * weight->to(at::kFloat);
    Tensor of_x = (wide - normal * (wide * normal).mean(-1, true)) * scale;
    return {of_x.to(x.scalar_type()), weighted ? of_weight.to(weight->scalar_type()) : Tensor()};
}

// What torch's CUDA code does itself: memory, views, streams.
static const std::set<std::string> KEPT = {
    "empty", "empty_strided", "set_", "resize_", "_resize_output_", "as_strided", "view", "_reshape_alias", "alias", "unfold",
    "view_as_real", "view_as_complex", "_nested_view_from_buffer", "is_set_to", "record_stream", "is_pinned", "_pin_memory",
    "copy_", "_copy_from", "_copy_from_and_resize", "_local_scalar_dense", "_fused_sdp_choice", "_cudnn_init_dropout_state",
    "_efficientzerotensor", "_to_dense", "_to_sparse"};

static bool is_view(const c10::FunctionSchema &schema) {
    for (const auto &result : schema.returns())
        if (result.alias_info() && !result.alias_info()->isWrite()) return true;
    return false;
}

static long install() {
    static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
    long replaced = 0;
    for (const auto &name : c10::Dispatcher::singleton().getAllOpNames()) {
        auto op = c10::Dispatcher::singleton().findSchema(name);
        if (!op || name.name.rfind("aten::", 0) != 0) continue;
        std::string base = name.name.substr(6);
        bool on_host = op->hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
                       op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd);
        if (KEPT.count(base) || !on_host || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) || is_view(op->schema())) continue;
        std::string whole = base + (name.overload_name.empty() ? "" : "." + name.overload_name);
        library.impl(whole.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute_on_host>());
        replaced++;
    }
    library.impl("copy_", TORCH_FN(copy_));
    library.impl("mm.dtype", TORCH_FN(mm_dtype));
    library.impl("_fused_rms_norm", TORCH_FN(rms_norm));
    library.impl("_fused_rms_norm_backward", TORCH_FN(rms_norm_backward));
    library.impl("_fused_sdp_choice", TORCH_FN(fused_sdp_choice));
    return replaced;
}

// Replaces the operators; returns how many, or -1 after it has said why it could not.
extern "C" long fake_gpu_install() {
    try {
        return install();
    } catch (const std::exception &error) {
        fprintf(stderr, "[fake GPU] %s\n", error.what());
        return -1;
    }
}

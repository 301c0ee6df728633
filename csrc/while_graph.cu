// A loop over steps that the device drives: one launch of a CUDA graph runs as many steps as are needed.
//
//     condition = *n_active > 0            kernel node: zero rows run zero steps
//     while (condition) {                  WHILE conditional node
//         one step                         what the caller launches between open and close
//         condition = *n_active > 0        kernel node
//     }
//
// Order of calls: open, the caller's launches on the stream it gave, close; then run, as often as wanted; free at any
// point. The caller makes the device of n_active current around every call. Every function that returns int returns a
// cudaError_t, 0 for success, whose text is hrm_while_error's. Nothing here waits for the device.

#include <cuda_runtime.h>

#include <cstdint>
#include <new>

#if CUDART_VERSION < 12040
#error "while_graph.cu needs the CUDA toolkit 12.4 or later: earlier graphs have no WHILE nodes"
#endif

#define TRY(call)                                             \
    do {                                                      \
        if (const cudaError_t code = (call)) return code;     \
    } while (0)

namespace {

constexpr int kOldestDriver = 12040;

__global__ void set_condition(cudaGraphConditionalHandle condition, const int32_t* n_active) {
    cudaGraphSetConditional(condition, *n_active > 0);
}

struct Loop {
    const int32_t* n_active;
    cudaStream_t stream;  // captured from between open and close
    bool capturing = false;
    cudaGraphConditionalHandle condition = 0;
    // Kept as long as exec: the condition's handle belongs to it, and CUDA promises nothing of one without its graph.
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;

    Loop(const int32_t* n_active, cudaStream_t stream) : n_active(n_active), stream(stream) {}
    Loop(const Loop&) = delete;
    Loop& operator=(const Loop&) = delete;

    // A stream left capturing would refuse everything but more capture. The body that EndCapture hands back is not ours
    // to destroy: the conditional node owns it. An exec that still runs is freed by the driver when it is done.
    ~Loop() {
        cudaGraph_t body;
        if (capturing) cudaStreamEndCapture(stream, &body);
        if (exec) cudaGraphExecDestroy(exec);
        if (graph) cudaGraphDestroy(graph);
    }
};

cudaError_t add_while(Loop& loop, cudaGraphNode_t after, cudaGraph_t* body) {
    cudaGraphNodeParams params = {};  // bytes that are not used must be zero
    params.type = cudaGraphNodeTypeConditional;
    params.conditional.handle = loop.condition;
    params.conditional.type = cudaGraphCondTypeWhile;
    params.conditional.size = 1;
    cudaGraphNode_t node;
#if CUDART_VERSION >= 13000  // takes data of the edges as well; none means an ordinary dependency
    TRY(cudaGraphAddNode(&node, loop.graph, &after, nullptr, 1, &params));
#else
    TRY(cudaGraphAddNode(&node, loop.graph, &after, 1, &params));
#endif
    *body = params.conditional.phGraph_out[0];
    return cudaSuccess;
}

// Everything up to the body, which the stream is left capturing into.
cudaError_t begin(Loop& loop) {
    TRY(cudaGraphCreate(&loop.graph, 0));
    // No default value: the kernel before the node sets the condition in every run.
    TRY(cudaGraphConditionalHandleCreate(&loop.condition, loop.graph, 0, 0));

    void* args[] = {&loop.condition, &loop.n_active};
    cudaKernelNodeParams first = {};
    first.func = reinterpret_cast<void*>(set_condition);
    first.gridDim = first.blockDim = dim3(1);
    first.kernelParams = args;
    cudaGraphNode_t node;
    cudaGraph_t body;
    TRY(cudaGraphAddKernelNode(&node, loop.graph, nullptr, 0, &first));
    TRY(add_while(loop, node, &body));

    // Thread-local: in global mode another thread's cudaMalloc or event query (a data loader, NCCL's watchdog) would
    // break the capture; relaxed mode would let this thread wait for the device or load a module inside the body, and
    // what a run does not repeat had better be an error.
    TRY(cudaStreamBeginCaptureToGraph(loop.stream, body, nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal));
    loop.capturing = true;
    return cudaSuccess;
}

// The condition as the body's last node; then the loop is whole.
cudaError_t finish(Loop& loop) {
    void* args[] = {&loop.condition, &loop.n_active};
    // Not <<<>>>: its error would have to be fetched from cudaGetLastError, which may be someone else's.
    TRY(cudaLaunchKernel(reinterpret_cast<const void*>(set_condition), dim3(1), dim3(1), args, 0, loop.stream));
    cudaGraph_t body;
    loop.capturing = false;
    TRY(cudaStreamEndCapture(loop.stream, &body));
    return cudaGraphInstantiate(&loop.exec, loop.graph, 0);
}

// A loop of nothing, made and not run.
cudaError_t try_loop(const int32_t* n_active) {
    cudaStream_t stream;
    TRY(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaError_t code;
    {
        Loop loop(n_active, stream);
        code = begin(loop);
        if (!code) code = finish(loop);
    }
    cudaStreamDestroy(stream);
    return code;
}

}  // namespace

extern "C" {

int hrm_while_runtime_version(void) { return CUDART_VERSION; }

// 0 where there is no driver.
int hrm_while_driver_version(void) {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* hrm_while_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Whether the current device can run loops. Asking for the kernel's attributes also loads it, which must not happen for
// the first time while a stream is captured, and fails where the library holds no code for the device. Then a loop of
// nothing is made, so that whatever refuses one (a driver, a tool that listens in) does so here.
int hrm_while_probe(void) {
    cudaFuncAttributes found;
    TRY(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(set_condition)));
    // An older driver of the same major version loads this library and lacks the functions it calls.
    if (hrm_while_driver_version() < kOldestDriver) return cudaErrorCallRequiresNewerDriver;
    int32_t* n_active;
    TRY(cudaMalloc(&n_active, sizeof *n_active));
    const cudaError_t code = try_loop(n_active);
    cudaFree(n_active);
    return code;
}

// Makes a loop over *n_active and begins to capture `stream`, which must not be the legacy default stream. After a
// failure nothing is captured and *loop is null.
int hrm_while_open(const int32_t* n_active, void* stream, void** loop) {
    *loop = nullptr;
    cudaPointerAttributes found;
    int device;
    TRY(cudaPointerGetAttributes(&found, n_active));
    TRY(cudaGetDevice(&device));
    if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged) return cudaErrorInvalidDevicePointer;
    if (found.device != device) return cudaErrorInvalidDevice;

    Loop* made = new (std::nothrow) Loop(n_active, static_cast<cudaStream_t>(stream));
    if (!made) return cudaErrorMemoryAllocation;
    const cudaError_t code = begin(*made);
    if (code) {
        delete made;
        made = nullptr;
    }
    *loop = made;
    return code;
}

// Ends the body with the kernel that sets the condition and makes the loop ready to run. On the thread that opened it;
// after a failure the loop can only be freed.
int hrm_while_close(void* loop) { return finish(*static_cast<Loop*>(loop)); }

// Launches a closed loop on `stream`, behind what is there and behind its own earlier runs.
int hrm_while_run(void* loop, void* stream) {
    return cudaGraphLaunch(static_cast<Loop*>(loop)->exec, static_cast<cudaStream_t>(stream));
}

// Frees a loop in whatever state it is. One that was not closed is still capturing: on the thread that opened it, then.
void hrm_while_free(void* loop) { delete static_cast<Loop*>(loop); }

}  // extern "C"

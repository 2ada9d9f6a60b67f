// The batched renderer: one call draws one camera of a group of environments. Forward only, no allocation, no
// synchronisation, so that a call can be captured into a CUDA graph.
//
// Stages: views of the bodies -> records on the screen -> counts of the tiles' entries -> places of their lists -> keys
// in the lists -> tiles drawn, from the longest list to the shortest.
#include "project.cuh"
#include "raster.cuh"
#include "tiles.cuh"

namespace {

constexpr int MAX_DEVICES = 64;
constexpr int MAX_TALLY = 160 * 1024;  // bytes of shared memory for one counter a tile

template <int MODE, bool EXTRAS>
cudaError_t launch_raster(const Args& a, cudaStream_t stream) {
    static int blocks_of[MAX_DEVICES];  // as many as the device can hold at once
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error || device >= MAX_DEVICES) return error ? error : cudaErrorInvalidDevice;
    int& blocks = blocks_of[device];
    if (!blocks) {
        int each, processors;
        error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, raster<MODE, EXTRAS>, THREADS, 0);
        if (error) return error;
        blocks = each * processors;
    }
    long long tiles = (long long)a.environments * tile_count(a);
    raster<MODE, EXTRAS><<<(int)(tiles < blocks ? tiles : blocks), THREADS, 0, stream>>>(a);
    return cudaGetLastError();
}

cudaError_t launch_project(const Args& a, dim3 grid, cudaStream_t stream) {
    switch (a.coefficients) {
        case 1: project<1><<<grid, THREADS, 0, stream>>>(a); break;
        case 4: project<4><<<grid, THREADS, 0, stream>>>(a); break;
        case 9: project<9><<<grid, THREADS, 0, stream>>>(a); break;
        case 16: project<16><<<grid, THREADS, 0, stream>>>(a); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

cudaError_t launch_lists(const Args& a, dim3 grid, int write, cudaStream_t stream) {
    size_t bytes = tile_count(a) * sizeof(u32);
    if (bytes > 32 * 1024) {  // more than the default must be asked for
        auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        if (cudaError_t error = cudaFuncSetAttribute(list_tiles, attribute, MAX_TALLY)) return error;
    }
    list_tiles<<<grid, THREADS, bytes, stream>>>(a, write);
    return cudaGetLastError();
}

cudaError_t launch_copy(const Args& a, cudaStream_t stream) {
    size_t bytes = (size_t)a.width * a.height * 3;
    int words = bytes % 16 == 0 && (size_t)a.rgb % 16 == 0 && (size_t)a.layer_picture % 16 == 0;
    size_t threads = words ? bytes / 16 : bytes;
    copy_layer<<<dim3((unsigned)((threads + 255) / 256), a.environments), 256, 0, stream>>>(a, words);
    return cudaGetLastError();
}

cudaError_t draw(const Args& a, cudaStream_t stream) {
    if (a.mode == STATIC_ONLY) return launch_raster<STATIC_ONLY, false>(a, stream);
    if (a.mode == LIVE) return a.extras ? launch_raster<LIVE, true>(a, stream) : launch_raster<LIVE, false>(a, stream);
    return a.extras ? launch_raster<OVER_LAYER, true>(a, stream) : launch_raster<OVER_LAYER, false>(a, stream);
}

cudaError_t render(const Args& a, cudaStream_t stream) {
    bool copied = a.mode == OVER_LAYER && !a.extras;
    size_t tallies = (size_t)a.environments * list_count(a) * tile_count(a);
    dim3 grid(a.chunk_count, a.environments);
    int views = a.environments * (a.bodies + 2);
    if (tile_count(a) * sizeof(u32) > MAX_TALLY) return cudaErrorInvalidValue;
    cudaError_t error = cudaMemsetAsync(a.state, 0, STATE * sizeof(u32), stream);
    if (!error) error = cudaMemsetAsync(a.counts, 0, tallies * sizeof(u32), stream);
    if (!error && copied) error = launch_copy(a, stream);
    if (error) return error;
    if (a.chunk_count) {
        make_views<<<(views + 127) / 128, 128, 0, stream>>>(a);
        error = cudaGetLastError();
        if (!error) error = launch_project(a, grid, stream);
        if (!error) error = launch_lists(a, grid, 0, stream);
    }
    if (error) return error;
    place_lists<<<a.environments, THREADS, 0, stream>>>(a, !copied);
    error = cudaGetLastError();
    if (!error && a.chunk_count) error = launch_lists(a, grid, 1, stream);
    return error ? error : draw(a, stream);
}

}  // namespace

// Draws one group; 0, or a CUDA error code.
extern "C" int gsrl_splat_render(const Args* args, void* stream) { return (int)render(*args, (cudaStream_t)stream); }

extern "C" const char* gsrl_splat_error(int code) { return cudaGetErrorString((cudaError_t)code); }

// Size of the arguments and digest of the source (build.version), for comparison with what Python expects.
#define TEXT_OF(token) #token
#define TEXT(macro) TEXT_OF(macro)
extern "C" int gsrl_splat_args_bytes() { return (int)sizeof(Args); }

extern "C" const char* gsrl_splat_version() { return TEXT(VERSION); }

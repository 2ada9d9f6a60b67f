// What one pass over a group of environments reads and writes, and the helpers that all its kernels share.
//
// The numbers in capitals that are not defined here (EPS2D, NEAR_PLANE, ...) come from gsrl_core/splat/constants.py as
// compiler definitions, so that every rasteriser draws the same picture.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

typedef unsigned long long u64;
typedef uint32_t u32;

// A tile is 16 x 16 pixels; warp w of its block owns the 8 x 4 pixels at column 8 (w & 1) and row 4 (w >> 1).
constexpr int TILE = 16, WARPS = 8, THREADS = 32 * WARPS;
// A chunk is what one block projects and lists: neighbouring Gaussians of one body, RUN of them for each warp.
constexpr int RUN = 128, CHUNK = WARPS * RUN;
constexpr int VIEW = 16;  // floats of one body's view: 3 x 4 row by row, the eye, one unused
constexpr int CLASSES = 4, STATE = 8;
constexpr int MOST_ENTRIES = 0, QUEUES = 1, TICKET = QUEUES + CLASSES;  // places in Args.state
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float LOG2_ALPHA_MIN = -7.994353436858858f;  // log2(1 / 255)

// How a pass treats the static part.
enum Mode { OVER_LAYER = 0, STATIC_ONLY = 1, LIVE = 2 };

// Mirrored by gsrl_core/splat/cuda/library.py, field by field.
struct Args {
    // The scene: N Gaussians, ordered by chunk.
    const float4* mean_reach;     // [N] centre in the body's frame, largest standard deviation times the cut-off
    const float4* covariance_a;   // [N] xx xy xz yy
    const float4* covariance_b;   // [N] yz zz log2(opacity) -
    const float* harmonics;       // [N, K, 3]
    const int4* chunks;           // first Gaussian, count, body (M for the static part), list (1: after the static one)
    const float4* runs;           // [chunks, WARPS, 2] sphere around the run's centres (centre, radius), largest reach
    // The group of environments.
    const float* poses;           // [E, M, 4, 4]
    const float* world_to_camera; // [E or 1, 4, 4]
    const float* K;               // [E or 1, 3, 3]
    // Pictures of the static part, [rows, h, w].
    float4* layer_color;          // rgb over black, depth beyond which bodies are hidden
    float2* layer_open;           // light that it lets through, mean depth
    uint8_t* layer_picture;       // [.., 3] finished, without bodies
    const int* layer_rows;        // [E] each environment's row; null if all have the first
    // Pictures, [E, h, w]; the last three only with extras.
    uint8_t* rgb;
    float* depth;
    float* alpha;
    int16_t* body;
    // Scratch.
    float* views;                 // [E, M + 2, VIEW]: bodies, the static part, the lens
    float4* records;              // [E, chunks, CHUNK, 2], each run's visible Gaussians first
    u32* depths;                  // [E, chunks, CHUNK] bits of the depth, which order as the depths do
    int* visible;                 // [E, chunks, WARPS]
    u32* counts;                  // [E, lists, tiles] entries of each tile's list
    u32* bases;                   // [E, chunks, tiles] where a chunk's entries start in their tile's list
    u32* starts;                  // [E, lists, tiles] within the environment's keys
    u32* queue;                   // [CLASSES, E, tiles] tiles to draw, longest first
    u32* state;                   // [STATE]: most entries of an environment, CLASSES queue lengths, next ticket
    u64* keys;                    // [E, room]: depth, record, warps of the tile that it touches
    long long room;
    float background[3];
    int environments, bodies, camera_stride, width, height;
    int first_chunk, chunk_count, coefficients, mode, extras;
};

struct Lens {
    float fx, fy, cx, cy;
    float low_x, high_x, low_y, high_y;  // x / z and y / z are clamped to these for the Jacobian
    float reach_x, reach_y;              // pixels at depth 1 that one metre of reach can cover at most
};

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }
__device__ __forceinline__ u32 lanes_below() { return (1u << lane_id()) - 1u; }
__host__ __device__ __forceinline__ int tiles_x(const Args& a) { return (a.width + TILE - 1) / TILE; }
__host__ __device__ __forceinline__ int tile_count(const Args& a) {
    return tiles_x(a) * ((a.height + TILE - 1) / TILE);
}
__host__ __device__ __forceinline__ int list_count(const Args& a) { return a.mode == LIVE ? 2 : 1; }

// a b - c d without cancellation (Kahan).
__device__ __forceinline__ float difference_of_products(float a, float b, float c, float d) {
    float cd = __fmul_rn(c, d);
    float error = __fmaf_rn(-c, d, cd);
    return __fadd_rn(__fmaf_rn(a, b, -cd), error);
}

__device__ __forceinline__ float fast_sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

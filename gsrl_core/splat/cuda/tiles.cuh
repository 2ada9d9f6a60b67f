// Which Gaussians each tile must draw: counted, placed, written. The lists are sorted later, where they are drawn.
#pragma once

#include "args.cuh"

// The ellipse on which alpha falls to ALPHA_MIN, as its width at each height.
//
// Counting and writing must agree on every entry, so all that follows is spelt out in rounded operations that the
// compiler may not contract differently in the two kernels.
struct Ellipse {
    float mean_x, mean_y;
    float half_height, half_width;  // half_width: at the height of the centre
    float shear;                    // the chord's centre moves by this for each pixel down
    float turn;                     // height of the rightmost point; the leftmost lies opposite
};

__device__ __forceinline__ Ellipse ellipse_of(float4 r0, float2 r1) {
    float xx = r0.z, xy = r0.w, yy = r1.x;
    float sigma = __fmul_rn(__fadd_rn(r1.y, -LOG2_ALPHA_MIN), LN2);
    float limit = __fmul_rn(2.f, __fmaf_rn(sigma, 1.0002f, 1e-3f));
    float determinant = difference_of_products(xx, yy, xy, xy);
    Ellipse e;
    e.mean_x = r0.x;
    e.mean_y = r0.y;
    e.half_height = fast_sqrt(__fmul_rn(limit, yy));
    e.half_width = fast_sqrt(__fmul_rn(limit, __fdividef(determinant, yy)));
    e.shear = __fdividef(xy, yy);
    e.turn = __fmul_rn(__fdividef(xy, xx), fast_sqrt(__fmul_rn(limit, xx)));
    return e;
}

// Half the chord at height y from the centre.
__device__ __forceinline__ float chord(const Ellipse& e, float y) {
    float t = __fdividef(y, e.half_height);
    return __fmul_rn(e.half_width, fast_sqrt(fmaxf(__fmaf_rn(-t, t, 1.f), 0.f)));
}

// First and last of the 8-pixel columns that the ellipse touches in pixel rows top .. top + 3; first > last for none.
__device__ __forceinline__ int2 columns_touched(const Ellipse& e, int top, int width) {
    float low = __fadd_rn((float)top + 0.5f, -e.mean_y), high = __fadd_rn(low, 3.f);
    low = fmaxf(low, -e.half_height);
    high = fminf(high, e.half_height);
    if (low > high) return make_int2(1, 0);
    // The chord's right end is farthest at the height nearest to the rightmost point; the left end likewise.
    float y_right = fminf(fmaxf(e.turn, low), high), y_left = fminf(fmaxf(-e.turn, low), high);
    float right = __fadd_rn(e.mean_x, __fmaf_rn(e.shear, y_right, chord(e, y_right)));
    float left = __fadd_rn(e.mean_x, __fmaf_rn(e.shear, y_left, -chord(e, y_left)));
    float first = ceilf(__fadd_rn(left, -0.51f)), last = floorf(__fadd_rn(right, -0.49f));
    first = fmaxf(first, 0.f);
    last = fminf(last, (float)(width - 1));
    return first > last ? make_int2(1, 0) : make_int2((int)first >> 3, (int)last >> 3);
}

// Calls put(tile, mask of the tile's warps) for every tile of one tile row that the ellipse touches.
template <class Put>
__device__ __forceinline__ void tiles_of_row(const Ellipse& e, int row, int width, int across, Put put) {
    int2 bands[4];
    int first = 1 << 30, last = -1;
#pragma unroll
    for (int band = 0; band < 4; band++) {
        bands[band] = columns_touched(e, row * TILE + 4 * band, width);
        if (bands[band].x <= bands[band].y) {
            first = min(first, bands[band].x);
            last = max(last, bands[band].y);
        }
    }
    for (int tile = first >> 1; 2 * tile <= last; tile++) {
        u32 mask = 0;
#pragma unroll
        for (int band = 0; band < 4; band++) {
            mask |= (u32)(bands[band].x <= 2 * tile && 2 * tile <= bands[band].y) << (2 * band);
            mask |= (u32)(bands[band].x <= 2 * tile + 1 && 2 * tile + 1 <= bands[band].y) << (2 * band + 1);
        }
        if (mask) put(row * across + tile, mask);
    }
}

// Calls put(tile, mask, lane that holds the Gaussian) for every tile that the warp's Gaussians touch; lanes without a
// Gaussian pass rows = 0. Work is handed out by tile row, because sizes differ widely.
template <class Put>
__device__ __forceinline__ void tiles_of_warp(Ellipse (&shared)[32], const Ellipse& mine, int top_row, int rows,
                                              int width, int across, Put put) {
    int lane = lane_id(), end = rows;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += other;
    }
    int total = __shfl_sync(~0u, end, 31), origin = top_row - (end - rows);
    shared[lane] = mine;
    __syncwarp();
    for (int base = 0; base < total; base += 32) {
        int item = base + lane, owner = 0;
        // The owner is the first lane whose end lies beyond the item.
#pragma unroll
        for (int step = 16; step; step /= 2) {
            int before = __shfl_sync(~0u, end, owner + step - 1);
            if (before <= item) owner += step;
        }
        owner = min(owner, 31);
        int row = __shfl_sync(~0u, origin, owner) + item;
        if (item < total) tiles_of_row(shared[owner], row, width, across, [&](int t, u32 m) { put(t, m, owner); });
    }
    __syncwarp();
}

// One block for each chunk and environment. Counting: adds the chunk's entries to each tile's count and remembers where
// they start in the tile's list. WRITE: writes them there. The order within a list is settled when it is sorted.
template <bool WRITE>
__global__ void __launch_bounds__(THREADS) list_tiles(Args a) {
    extern __shared__ u32 tally[];  // [tiles]
    __shared__ Ellipse ellipses[WARPS][32];
    int environment = blockIdx.y, tiles = tile_count(a), across = tiles_x(a);
    size_t block = (size_t)environment * a.chunk_count + blockIdx.x;
    int4 few = __ldg((const int4*)(a.visible + block * WARPS)), more = __ldg((const int4*)(a.visible + block * WARPS) + 1);
    int ends[WARPS] = {few.x, few.y, few.z, few.w, more.x, more.y, more.z, more.w};  // of the runs, among the visible
#pragma unroll
    for (int w = 1; w < WARPS; w++) ends[w] += ends[w - 1];
    int visible = ends[WARPS - 1];
    if (!visible) return;
    int list = a.mode == LIVE ? __ldg(&a.chunks[a.first_chunk + blockIdx.x].w) : 0;
    size_t first_tile = ((size_t)environment * list_count(a) + list) * tiles;
    u32* bases = a.bases + block * tiles;
    for (int t = threadIdx.x; t < tiles; t += THREADS) tally[t] = WRITE ? a.starts[first_tile + t] + bases[t] : 0;
    __syncthreads();
    size_t offset = block * CHUNK;
    for (int group = 32 * warp_id(); group < visible; group += THREADS) {
        int top_row = 0, rows = 0, at = group + lane_id();
        Ellipse e = {};
        u64 key = 0;
        if (at < visible) {
            int before = 0;
#pragma unroll
            for (int w = 0; w < WARPS - 1; w++)
                if (at >= ends[w]) before = (w + 1) * RUN - ends[w];
            at += before;
            float4 r0 = __ldg(a.records + 2 * (offset + at));
            e = ellipse_of(r0, __ldg((const float2*)(a.records + 2 * (offset + at) + 1)));
            float top = fmaxf(ceilf(__fadd_rn(__fadd_rn(e.mean_y, -e.half_height), -0.51f)), 0.f);
            float bottom = fminf(floorf(__fadd_rn(__fadd_rn(e.mean_y, e.half_height), -0.49f)), (float)(a.height - 1));
            if (top <= bottom) {
                top_row = (int)top / TILE;
                rows = (int)bottom / TILE - top_row + 1;
            }
            if (WRITE) key = ((u64)__ldg(a.depths + offset + at) << 32) | ((u32)(blockIdx.x * CHUNK + at) << 8);
        }
        if constexpr (WRITE) {
            __shared__ u64 keys[WARPS][32];
            keys[warp_id()][lane_id()] = key;
            tiles_of_warp(ellipses[warp_id()], e, top_row, rows, a.width, across, [&](int tile, u32 mask, int owner) {
                long long at = atomicAdd(&tally[tile], 1u);
                if (at < a.capacity) a.keys[at] = keys[warp_id()][owner] | mask;
            });
        } else {
            tiles_of_warp(ellipses[warp_id()], e, top_row, rows, a.width, across,
                          [&](int tile, u32, int) { atomicAdd(&tally[tile], 1u); });
        }
    }
    if (WRITE) return;
    __syncthreads();
    for (int t = threadIdx.x; t < tiles; t += THREADS)
        if (tally[t]) bases[t] = atomicAdd(a.counts + first_tile + t, tally[t]);
}

// Inclusive sum over the block of one value for each thread; scratch [WARPS].
__device__ __forceinline__ u32 block_sum(u32 value, u32* scratch, u32& total) {
    u32 sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(~0u, sum, step);
        if (lane_id() >= step) sum += other;
    }
    if (lane_id() == 31) scratch[warp_id()] = sum;
    __syncthreads();
    total = 0;
    u32 before = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < warp_id()) before += scratch[w];
        total += scratch[w];
    }
    __syncthreads();
    return sum + before;
}

__device__ __forceinline__ int length_class(u32 entries) {
    return entries > 1024 ? 0 : entries > 384 ? 1 : entries > 96 ? 2 : 3;
}

// One block for each environment: where each list starts, and which tiles to draw (all of them if every_tile).
__global__ void __launch_bounds__(THREADS) place_lists(Args a, int every_tile) {
    __shared__ u32 scratch[WARPS], reserved[CLASSES], first;
    int tiles = tile_count(a), lists = list_count(a), environment = blockIdx.x, total = lists * tiles;
    const u32* counts = a.counts + (size_t)environment * total;
    u32* starts = a.starts + (size_t)environment * total;
    u32 running = 0, sum;
    if (threadIdx.x < CLASSES) reserved[threadIdx.x] = 0;
    for (int base = 0; base < total; base += THREADS) {
        int i = base + threadIdx.x;
        u32 count = i < total ? counts[i] : 0, end = block_sum(count, scratch, sum);
        if (i < total) starts[i] = running + end - count;
        running += sum;
    }
    if (threadIdx.x == 0) first = (u32)atomicAdd((u64*)a.state, (u64)running);
    __syncthreads();
    for (int i = threadIdx.x; i < total; i += THREADS) starts[i] += first;
    for (int pass = 0; pass < 2; pass++) {
        for (int t = threadIdx.x; t < tiles; t += THREADS) {
            u32 entries = counts[t] + (lists > 1 ? counts[tiles + t] : 0);
            if (!entries && !every_tile) continue;
            int kind = length_class(entries);
            u32 at = atomicAdd(&reserved[kind], 1u);
            if (pass) a.queue[(size_t)kind * a.environments * tiles + at] = environment * tiles + t;
        }
        __syncthreads();
        if (!pass && threadIdx.x < CLASSES)
            reserved[threadIdx.x] = atomicAdd(a.state + 2 + threadIdx.x, reserved[threadIdx.x]);
        __syncthreads();
    }
}

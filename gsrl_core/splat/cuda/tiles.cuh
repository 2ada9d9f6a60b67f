// Which Gaussians each tile must draw: counted, lists placed, keys written. Lists are sorted where they are drawn.
#pragma once

#include "args.cuh"

// The ellipse on which alpha falls to ALPHA_MIN, as its width at each height.
struct alignas(16) Ellipse {
    float mean_x, mean_y;
    float half_height, half_width;  // half_width: at the height of the centre
    float shear;                    // the chord's centre moves by this for each pixel down
    float turn;                     // height of the rightmost point; the leftmost lies opposite
    float inverse_height;
};

__device__ __forceinline__ Ellipse ellipse_of(float4 r0, float2 r1) {
    float xx = r0.z, xy = r0.w, yy = r1.x;
    // A little larger than exact, so that rounding never drops a pixel that the alpha test would keep.
    float limit = 2.f * ((r1.y - LOG2_ALPHA_MIN) * LN2 * 1.0002f + 1e-3f);
    Ellipse e;
    e.mean_x = r0.x;
    e.mean_y = r0.y;
    e.half_height = fast_sqrt(limit * yy);
    e.half_width = fast_sqrt(limit * __fdividef(difference_of_products(xx, yy, xy, xy), yy));
    e.shear = __fdividef(xy, yy);
    e.turn = __fdividef(xy, xx) * fast_sqrt(limit * xx);
    e.inverse_height = __fdividef(1.f, e.half_height);
    return e;
}

// Half the chord at height y from the centre.
__device__ __forceinline__ float chord(const Ellipse& e, float y) {
    float t = y * e.inverse_height;
    return e.half_width * fast_sqrt(fmaxf(1.f - t * t, 0.f));
}

// First and last of the 8-pixel columns that the ellipse touches in pixel rows top .. top + 3; first > last for none.
__device__ __forceinline__ int2 columns_touched(const Ellipse& e, int top, int width) {
    float low = top + 0.5f - e.mean_y, high = fminf(low + 3.f, e.half_height);
    low = fmaxf(low, -e.half_height);
    // The chord's right end is farthest at the height nearest to the rightmost point; the left end likewise.
    float y_right = fminf(fmaxf(e.turn, low), high), y_left = fminf(fmaxf(-e.turn, low), high);
    float right = e.mean_x + e.shear * y_right + chord(e, y_right);
    float left = e.mean_x + e.shear * y_left - chord(e, y_left);
    int first = (int)fmaxf(ceilf(left - 0.51f), 0.f), last = (int)fminf(floorf(right - 0.49f), width - 1.f);
    return low > high || first > last ? make_int2(1 << 24, -1) : make_int2(first >> 3, last >> 3);
}

// First and number of the pixel tile rows that the ellipse touches.
__device__ __forceinline__ int2 rows_touched(const Ellipse& e, int height) {
    float top = fmaxf(ceilf(e.mean_y - e.half_height - 0.51f), 0.f);
    float bottom = fminf(floorf(e.mean_y + e.half_height - 0.49f), height - 1.f);
    if (!(top <= bottom)) return make_int2(0, 0);
    return make_int2((int)top / TILE, (int)bottom / TILE - (int)top / TILE + 1);
}

// Sum of value over the lanes up to this one.
__device__ __forceinline__ u32 warp_sum(u32 value) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(~0u, value, step);
        if (lane_id() >= step) value += other;
    }
    return value;
}

// Bits x .. y of a row of 8-pixel columns that begins at column `first`.
__device__ __forceinline__ u32 column_bits(int2 columns, int first) {
    int low = max(columns.x - first, 0), high = min(columns.y - first, 31);
    return low > high ? 0u : (~0u << low) & (~0u >> (31 - high));
}

// The tiles of one tile row that the ellipse touches: one entry each in tally, and in keys if `write`.
__device__ __forceinline__ void enter_row(const Args& a, const Ellipse& e, int row, u64 key, int write, u32* tally) {
    int2 bands[4];
    int first = 1 << 24, last = -1;
#pragma unroll
    for (int band = 0; band < 4; band++) {
        bands[band] = columns_touched(e, row * TILE + 4 * band, a.width);
        first = min(first, bands[band].x);
        last = max(last, bands[band].y);
    }
    first >>= 1, last >>= 1;  // tiles
    u64* keys = a.keys + (size_t)blockIdx.y * a.room;
    u32* row_tally = tally + row * tiles_x(a);
    for (int group = first; group <= last; group += 16) {
        int end = min(group + 15, last);
        if (!write) {
            for (int tile = group; tile <= end; tile++) atomicAdd(row_tally + tile, 1u);
            continue;
        }
        u32 columns[4];
#pragma unroll
        for (int band = 0; band < 4; band++) columns[band] = column_bits(bands[band], 2 * group);
        for (int tile = group; tile <= end; tile++) {
            u32 mask = 0;
#pragma unroll
            for (int band = 0; band < 4; band++) {
                mask |= (columns[band] & 3u) << (2 * band);
                columns[band] >>= 2;
            }
            u32 at = atomicAdd(row_tally + tile, 1u);
            if (at < a.room) keys[at] = key | mask;
        }
    }
}

// One block for each chunk and environment, launched twice. First it counts: it adds the chunk's entries to each tile's
// count and remembers where they start in the tile's list. Then it writes the keys there; their order within a list is
// settled when it is sorted. One kernel for both, so that they cannot disagree by a rounding.
__global__ void __launch_bounds__(THREADS) list_tiles(Args a, int write) {
    extern __shared__ u32 tally[];  // [tiles]
    __shared__ Ellipse ellipses[WARPS][32];
    __shared__ u64 keys[WARPS][32];
    int environment = blockIdx.y, tiles = tile_count(a), lane = lane_id(), warp = warp_id();
    size_t block = (size_t)environment * a.chunk_count + blockIdx.x;
    const int4* runs = (const int4*)(a.visible + block * WARPS);
    int4 few = __ldg(runs), more = __ldg(runs + 1);
    int ends[WARPS] = {few.x, few.y, few.z, few.w, more.x, more.y, more.z, more.w};  // of the runs, among the visible
#pragma unroll
    for (int w = 1; w < WARPS; w++) ends[w] += ends[w - 1];
    int visible = ends[WARPS - 1];
    if (!visible) return;
    int list = a.mode == LIVE ? __ldg(&a.chunks[a.first_chunk + blockIdx.x].w) : 0;
    size_t first_list = ((size_t)environment * list_count(a) + list) * tiles;
    u32* bases = a.bases + block * tiles;
    // Tiles without an entry of this chunk have no base; what is read there is not used.
    for (int t = threadIdx.x; t < tiles; t += THREADS) tally[t] = write ? a.starts[first_list + t] + bases[t] : 0;
    __syncthreads();
    const float4* records = a.records + 2 * block * CHUNK;
    for (int group = 32 * warp; group < visible; group += THREADS) {
        int at = group + lane;
        int2 rows = make_int2(0, 0);
        if (at < visible) {
            int gap = 0;
#pragma unroll
            for (int w = 0; w < WARPS - 1; w++)
                if (at >= ends[w]) gap = (w + 1) * RUN - ends[w];
            at += gap;
            Ellipse mine = ellipse_of(__ldg(records + 2 * at), __ldg((const float2*)(records + 2 * at + 1)));
            rows = rows_touched(mine, a.height);
            ellipses[warp][lane] = mine;
            u64 depth = __ldg(a.depths + block * CHUNK + at);
            keys[warp][lane] = depth << 32 | (u32)(blockIdx.x * CHUNK + at) << 8;
        }
        __syncwarp();
        // Work is handed out by tile row, because sizes differ widely.
        int end = warp_sum(rows.y), total = __shfl_sync(~0u, end, 31), origin = rows.x - (end - rows.y);
        for (int base = 0; base < total; base += 32) {
            int item = base + lane, owner = 0;
#pragma unroll
            for (int step = 16; step; step /= 2)  // the owner is the first lane whose end lies beyond the item
                if (__shfl_sync(~0u, end, owner + step - 1) <= item) owner += step;
            int row = __shfl_sync(~0u, origin, owner) + item;
            if (item < total) enter_row(a, ellipses[warp][owner], row, keys[warp][owner], write, tally);
        }
        __syncwarp();
    }
    if (write) return;
    __syncthreads();
    for (int t = threadIdx.x; t < tiles; t += THREADS)
        if (tally[t]) bases[t] = atomicAdd(a.counts + first_list + t, tally[t]);
}

// Inclusive sum over the block of one value for each thread; scratch [WARPS].
__device__ __forceinline__ u32 block_sum(u32 value, u32* scratch, u32& total) {
    u32 sum = warp_sum(value);
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
    __shared__ u32 scratch[WARPS], reserved[CLASSES];
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
    if (threadIdx.x == 0) atomicMax(a.state + MOST_ENTRIES, running);
    __syncthreads();
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
            reserved[threadIdx.x] = atomicAdd(a.state + QUEUES + threadIdx.x, reserved[threadIdx.x]);
        __syncthreads();
    }
}

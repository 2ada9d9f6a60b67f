// From Gaussians in their bodies' frames to records on the screen.
#pragma once

#include "args.cuh"

// One thread for each body of each environment (and the static part, and the lens): where the camera is in its frame.
__global__ void make_views(Args a) {
    int slots = a.bodies + 2, index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= a.environments * slots) return;
    int environment = index / slots, body = index % slots;
    float* out = a.views + (size_t)index * VIEW;
    const float* camera = a.world_to_camera + (size_t)environment * a.camera_stride * 16;
    const float* K = a.K + (size_t)environment * a.camera_stride * 9;
    if (body > a.bodies) {
        double fx = K[0], fy = K[4], cx = K[2], cy = K[5];
        double margin_x = FRUSTUM_MARGIN * 0.5 * a.width / fx, margin_y = FRUSTUM_MARGIN * 0.5 * a.height / fy;
        double low_x = -cx / fx - margin_x, high_x = (a.width - cx) / fx + margin_x;
        double low_y = -cy / fy - margin_y, high_y = (a.height - cy) / fy + margin_y;
        double x = fmax(fabs(low_x), fabs(high_x)), y = fmax(fabs(low_y), fabs(high_y));
        double lens[10] = {fx, fy, cx, cy, low_x, high_x, low_y, high_y, 1.001 * fx * sqrt(1 + x * x),
                           1.001 * fy * sqrt(1 + y * y)};
        for (int i = 0; i < 10; i++) out[i] = (float)lens[i];
        return;
    }
    double view[12];
    for (int row = 0; row < 3; row++)
        for (int column = 0; column < 4; column++) {
            double sum = camera[row * 4 + column];
            if (body < a.bodies) {
                const float* pose = a.poses + ((size_t)environment * a.bodies + body) * 16;
                sum = column == 3 ? camera[row * 4 + 3] : 0.0;
                for (int k = 0; k < 3; k++) sum += (double)camera[row * 4 + k] * pose[k * 4 + column];
            }
            view[row * 4 + column] = sum;
        }
    for (int i = 0; i < 12; i++) out[i] = (float)view[i];
    for (int axis = 0; axis < 3; axis++)
        out[12 + axis] = (float)-(view[axis] * view[3] + view[4 + axis] * view[7] + view[8 + axis] * view[11]);
    out[15] = 0.f;
}

// COUNT floats, 16 bytes at a time where rows of that length are so aligned.
template <int COUNT>
__device__ __forceinline__ void read(const float* __restrict__ from, float (&to)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int k = 0; k < COUNT / 4; k++) *(float4*)(to + 4 * k) = __ldg((const float4*)from + k);
    } else {
#pragma unroll
        for (int k = 0; k < COUNT; k++) to[k] = __ldg(from + k);
    }
}

// max(0, 0.5 + sum_k h_k basis_k) in direction (x, y, z) of any length; COUNT coefficients.
template <int COUNT>
__device__ __forceinline__ float3 color_of(const float* __restrict__ h, float x, float y, float z) {
    float basis[COUNT];
    basis[0] = 0.28209479177387814f;
    if (COUNT > 1) {
        float scale = rsqrtf(fmaxf(x * x + y * y + z * z, 1e-24f));
        x *= scale, y *= scale, z *= scale;
    }
    if constexpr (COUNT > 1) {
        basis[1] = -0.4886025119029199f * y;
        basis[2] = 0.4886025119029199f * z;
        basis[3] = -0.4886025119029199f * x;
    }
    float xx = x * x, yy = y * y, zz = z * z;
    if constexpr (COUNT > 4) {
        basis[4] = 1.0925484305920792f * x * y;
        basis[5] = -1.0925484305920792f * y * z;
        basis[6] = 0.31539156525252005f * (2 * zz - xx - yy);
        basis[7] = -1.0925484305920792f * x * z;
        basis[8] = 0.5462742152960396f * (xx - yy);
    }
    if constexpr (COUNT > 9) {
        basis[9] = -0.5900435899266435f * y * (3 * xx - yy);
        basis[10] = 2.890611442640554f * x * y * z;
        basis[11] = -0.4570457994644658f * y * (4 * zz - xx - yy);
        basis[12] = 0.3731763325901154f * z * (2 * zz - 3 * xx - 3 * yy);
        basis[13] = -0.4570457994644658f * x * (4 * zz - xx - yy);
        basis[14] = 1.445305721320277f * z * (xx - yy);
        basis[15] = -0.5900435899266435f * x * (xx - 3 * yy);
    }
    float values[COUNT * 3];
    read<COUNT * 3>(h, values);
    float3 color = make_float3(0.5f, 0.5f, 0.5f);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        color.x += basis[k] * values[3 * k];
        color.y += basis[k] * values[3 * k + 1];
        color.z += basis[k] * values[3 * k + 2];
    }
    return make_float3(fmaxf(color.x, 0.f), fmaxf(color.y, 0.f), fmaxf(color.z, 0.f));
}

struct Footprint {
    float mean_x, mean_y, xx, xy, yy, depth, log2_opacity;
};

// EWA projection of Gaussian i; false where it touches no pixel. view: 3 x 4 row by row.
__device__ __forceinline__ bool project_one(const Args& a, int i, const float* view, const Lens& lens, float4 mean,
                                            Footprint& f) {
    float x = view[0] * mean.x + view[1] * mean.y + view[2] * mean.z + view[3];
    float y = view[4] * mean.x + view[5] * mean.y + view[6] * mean.z + view[7];
    float z = view[8] * mean.x + view[9] * mean.y + view[10] * mean.z + view[11];
    if (!(z >= NEAR_PLANE && z <= FAR_PLANE)) return false;
    float inverse = 1.f / z;
    f.mean_x = lens.fx * x * inverse + lens.cx;
    f.mean_y = lens.fy * y * inverse + lens.cy;
    // First without the covariance: most Gaussians are far outside and need not be read. 2 px is more than the
    // low-pass filter can add.
    float bound_x = lens.reach_x * mean.w * inverse + 2.f, bound_y = lens.reach_y * mean.w * inverse + 2.f;
    if (f.mean_x + bound_x < 0.f || f.mean_x - bound_x > a.width) return false;
    if (f.mean_y + bound_y < 0.f || f.mean_y - bound_y > a.height) return false;

    float4 p = __ldg(a.covariance_a + i), q = __ldg(a.covariance_b + i);
    float tx = fminf(fmaxf(x, lens.low_x * z), lens.high_x * z);
    float ty = fminf(fmaxf(y, lens.low_y * z), lens.high_y * z);
    float jx = lens.fx * inverse, jxz = -jx * tx * inverse, jy = lens.fy * inverse, jyz = -jy * ty * inverse;
    float m0 = jx * view[0] + jxz * view[8], m1 = jx * view[1] + jxz * view[9], m2 = jx * view[2] + jxz * view[10];
    float m3 = jy * view[4] + jyz * view[8], m4 = jy * view[5] + jyz * view[9], m5 = jy * view[6] + jyz * view[10];
    float p0 = m0 * p.x + m1 * p.y + m2 * p.z, p1 = m0 * p.y + m1 * p.w + m2 * q.x, p2 = m0 * p.z + m1 * q.x + m2 * q.y;
    float q0 = m3 * p.x + m4 * p.y + m5 * p.z, q1 = m3 * p.y + m4 * p.w + m5 * q.x, q2 = m3 * p.z + m4 * q.x + m5 * q.y;
    f.xx = p0 * m0 + p1 * m1 + p2 * m2 + EPS2D;
    f.xy = p0 * m3 + p1 * m4 + p2 * m5;
    f.yy = q0 * m3 + q1 * m4 + q2 * m5 + EPS2D;
    f.depth = z;
    f.log2_opacity = q.z;
    float sigma_max = (q.z - LOG2_ALPHA_MIN) * LN2;
    // A little larger than exact, so that rounding never drops a pixel that the alpha test would keep.
    float extent_x = 1.0001f * sqrtf(2.f * sigma_max * f.xx) + 1e-3f;
    float extent_y = 1.0001f * sqrtf(2.f * sigma_max * f.yy) + 1e-3f;
    return difference_of_products(f.xx, f.yy, f.xy, f.xy) > 0.f && f.mean_x + extent_x >= 0.5f &&
           f.mean_x - extent_x <= a.width - 0.5f && f.mean_y + extent_y >= 0.5f &&
           f.mean_y - extent_y <= a.height - 0.5f;
}

// A colour in 8 bytes: 21 bits for each channel, the exponent and 13 bits of the mantissa of a positive float.
__device__ __forceinline__ float2 pack_color(float3 color) {
    u64 r = (__float_as_uint(color.x) + 0x200u) >> 10, g = (__float_as_uint(color.y) + 0x200u) >> 10;
    u64 packed = r | g << 21 | (u64)((__float_as_uint(color.z) + 0x200u) >> 10) << 42;
    return make_float2(__uint_as_float((u32)packed), __uint_as_float((u32)(packed >> 32)));
}

// Whether no Gaussian of a run can pass the first test of project_one: its sphere lies behind the camera or beyond one
// of the planes through the eye and an edge of the (enlarged) picture.
__device__ __forceinline__ bool outside(const Args& a, const float* view, const Lens& lens, float4 sphere,
                                        float reach) {
    float x = view[0] * sphere.x + view[1] * sphere.y + view[2] * sphere.z + view[3];
    float y = view[4] * sphere.x + view[5] * sphere.y + view[6] * sphere.z + view[7];
    float z = view[8] * sphere.x + view[9] * sphere.y + view[10] * sphere.z + view[11];
    float left = lens.cx + 2.f, right = a.width - lens.cx + 2.f, top = lens.cy + 2.f, bottom = a.height - lens.cy + 2.f;
    float across = lens.reach_x * reach, down = lens.reach_y * reach, r = sphere.w;
    return z + r < NEAR_PLANE || lens.fx * x + left * z + across + r * hypotf(lens.fx, left) < 0.f ||
           -lens.fx * x + right * z + across + r * hypotf(lens.fx, right) < 0.f ||
           lens.fy * y + top * z + down + r * hypotf(lens.fy, top) < 0.f ||
           -lens.fy * y + bottom * z + down + r * hypotf(lens.fy, bottom) < 0.f;
}

// One block for each chunk and environment; each warp writes its run's visible Gaussians without gaps, in order.
template <int COUNT>
__global__ void __launch_bounds__(THREADS) project(Args a) {
    int4 chunk = __ldg(a.chunks + a.first_chunk + blockIdx.x);
    int environment = blockIdx.y, run = warp_id() * RUN;
    const float* base = a.views + (size_t)environment * (a.bodies + 2) * VIEW;
    float view[VIEW];
    Lens lens;
#pragma unroll
    for (int i = 0; i < VIEW; i++) view[i] = __ldg(base + chunk.z * VIEW + i);
#pragma unroll
    for (int i = 0; i < 10; i++) ((float*)&lens)[i] = __ldg(base + (a.bodies + 1) * VIEW + i);
    size_t block = (size_t)environment * a.chunk_count + blockIdx.x, slot = block * CHUNK + run;
    int found = 0;
    const float4* sphere = a.runs + ((size_t)(a.first_chunk + blockIdx.x) * WARPS + warp_id()) * 2;
    if (outside(a, view, lens, __ldg(sphere), __ldg(sphere + 1).x)) {
        if (lane_id() == 0) a.visible[block * WARPS + warp_id()] = 0;
        return;
    }
    for (int i = run + lane_id(); i < run + RUN; i += 32) {
        Footprint f;
        float4 mean;
        bool seen = i < chunk.y;
        if (seen) {
            mean = __ldg(a.mean_reach + chunk.x + i);
            seen = project_one(a, chunk.x + i, view, lens, mean, f);
        }
        u32 vote = __ballot_sync(~0u, seen);
        if (seen) {
            size_t at = slot + found + __popc(vote & lanes_below());
            float2 c = pack_color(color_of<COUNT>(a.harmonics + (size_t)(chunk.x + i) * COUNT * 3, mean.x - view[12],
                                                  mean.y - view[13], mean.z - view[14]));
            a.records[2 * at] = make_float4(f.mean_x, f.mean_y, f.xx, f.xy);
            a.records[2 * at + 1] = make_float4(f.yy, f.log2_opacity, c.x, c.y);
            a.depths[at] = __float_as_uint(f.depth);
        }
        found += __popc(vote);
    }
    if (lane_id() == 0) a.visible[block * WARPS + warp_id()] = found;
}

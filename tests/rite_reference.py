"""LoRA-RITE's step as it is specified, for one pair after the other, in plain words of algebra."""

import torch


def corrected(beta, t):
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def start(m, n, r):
    """Return the state of a pair: of each side momentum, second moment, escaped mass and basis."""
    side = {
        "A": (n, m),
        "B": (m, n),
    }
    state = {"t": 0}
    for name, (rows, rows_of_dual) in side.items():
        state[name] = {
            "M": torch.zeros(rows, r).double(),
            "V": torch.zeros(r, r).double(),
            "rho": torch.tensor(0.0).double(),
            "U": torch.zeros(rows_of_dual, r).double(),
        }
    return state


def step(pairs, lr, betas=(0.9, 0.999), eps=1e-6, clip=1.0, decay=0.0, escape=True, V_is_one=False):
    """Return the new (B, A) of each pair (B, A, G, s, state), with G = dL/dW (m, n) at W.

    The state changes in place. The unmagnified gradients are taken from G: h_A = G^T U_B.
    """
    prepared = []
    for B, A, G, s, state in pairs:
        state["t"] += 1
        U_B, R_B = torch.linalg.qr(B)
        U_A, R_A = torch.linalg.qr(A.T)
        K_B, K_A = torch.linalg.pinv(R_B), torch.linalg.pinv(R_A)
        h_A = G.T @ U_B @ R_B @ K_B  # G^T U_B where B has full rank
        h_B = G @ U_A @ R_A @ K_A
        prepared.append((B, A, s, state, (U_B, K_B, h_A), (U_A, K_A, h_B)))
    norm = sum((a[2].norm() ** 2 + b[2].norm() ** 2) for *_, a, b in prepared).sqrt()
    c = 1.0 if clip is None else min(1.0, float(clip / norm))
    moved = []
    for B, A, s, state, of_A, of_B in prepared:
        steps = {}
        for side, (U, K, h) in (("A", of_A), ("B", of_B)):
            own, t = state[side], state["t"]
            b1, b2 = corrected(betas[0], t), corrected(betas[1], t)
            h = c * h
            P = U.T @ own["U"]
            V, M = P @ own["V"] @ P.T, own["M"] @ P.T
            lost = 0.0
            if escape:
                old, new = torch.linalg.eigvalsh(own["V"]), torch.linalg.eigvalsh((V + V.T) / 2)
                lost = min(
                    (old - new).clamp_min(0).max(), (own["V"].trace() - V.trace()).clamp_min(0)
                )
            own["rho"] = b2 * (own["rho"] + lost)
            V = b2 * V + (1 - b2) * h.T @ h / len(h)
            V = (V + V.T) / 2
            lam, Q = torch.linalg.eigh(V)
            Y = Q @ torch.diag(1 / ((lam.clamp_min(0) + own["rho"]).sqrt() + eps)) @ Q.T
            Y = torch.eye(len(Y)).double() if V_is_one else Y
            M = b1 * M + (1 - b1) * h @ Y
            own.update(M=M, V=V, U=U)
            steps[side] = M @ K.T / s
        new_A = A - lr * (steps["A"].T + decay * A)
        moved.append((B - lr * (steps["B"] + decay * B), new_A))
    return moved

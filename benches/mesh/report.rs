//! The table: what was measured, beside the floors.

use comfy_table::{ContentArrangement, Table, presets};

/// One figure that has a floor.
pub struct Row {
    pub load: String,
    pub raw: String,
    pub relay: String,
    pub mesh: String,
    /// What is compared with the floor, and the floor.
    pub measured: f64,
    pub floor: Floor,
    pub unit: &'static str,
}

#[derive(Debug, Clone, Copy)]
pub enum Floor {
    AtMost(f64),
    AtLeast(f64),
}

impl Row {
    fn holds(&self) -> bool {
        match self.floor {
            Floor::AtMost(most) => self.measured <= most,
            Floor::AtLeast(least) => self.measured >= least,
        }
    }
}

#[derive(Default)]
pub struct Report {
    pub rows: Vec<Row>,
    /// Said below the table.
    pub notes: Vec<String>,
}

impl Report {
    pub fn holds(&self) -> bool {
        self.rows.iter().all(Row::holds)
    }

    pub fn print(&self) {
        let mut table = Table::new();
        table
            .load_style(presets::ASCII_MARKDOWN)
            .set_content_arrangement(ContentArrangement::Disabled);
        table.set_header([
            "load",
            "no mesh",
            "two plain relays",
            "Culvert",
            "measured",
            "floor",
            "verdict",
        ]);
        for row in &self.rows {
            let floor = match row.floor {
                Floor::AtMost(most) => format!("≤ {most} {}", row.unit),
                Floor::AtLeast(least) => format!("≥ {least} {}", row.unit),
            };
            table.add_row([
                row.load.clone(),
                row.raw.clone(),
                row.relay.clone(),
                row.mesh.clone(),
                format!("{:.2} {}", row.measured, row.unit),
                floor,
                if row.holds() { "holds" } else { "MISSED" }.to_owned(),
            ]);
        }
        println!("{table}\n");
        for note in &self.notes {
            println!("- {note}");
        }
    }
}

/// The middle one of what was measured.
pub fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    match all.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => all[odd / 2],
        even => (all[even / 2 - 1] + all[even / 2]) / 2.0,
    }
}

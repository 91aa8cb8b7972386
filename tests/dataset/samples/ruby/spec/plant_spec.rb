require 'garden/plant'

RSpec.describe Garden::Plant do
  it 'ripens with age' do
    expect(Garden::Plant.new('bean', 60).ripe?(61)).to be(true)
  end
end
